"""Models as MLflow keeps them: logged from a stage's folder as they are, found again by their DVC hash."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

HASH_TAG = "alignflow.model_md5"
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate")


def find_model(client: MlflowClient, experiment_id: str, md5: str) -> LoggedModel | None:
    """The complete logged model with this hash, if any."""
    found = client.search_logged_models([experiment_id], f"tags.`{HASH_TAG}` = '{md5}'")
    return next((model for model in found if str(model.status) == "READY"), None)


def log_model(client: MlflowClient, run_id: str, folder: Path, md5: str, name: str = "model") -> str:
    """Copy a saved model into MLflow and return its model id; one the run has already is left as it is.

    A causal model answers as a `text-generation` pipeline, a reward model (`num_labels` 1) as
    `text-classification` with its raw score. The weights are copied, never loaded.
    """
    import mlflow
    from mlflow import transformers as flavour

    experiment_id = client.get_run(run_id).info.experiment_id
    present = client.search_logged_models(
        [experiment_id], f"tags.`{HASH_TAG}` = '{md5}' AND source_run_id = '{run_id}'"
    )
    for model in present:
        if str(model.status) == "READY":
            return model.model_id
        client.delete_logged_model(model.model_id)  # half sent when its process died
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_reward = config["architectures"][0].endswith("ForSequenceClassification")
    task = "text-classification" if is_reward else "text-generation"
    with mlflow.start_run(run_id=run_id), _named_pipeline(task):
        logged = flavour.log_model(
            str(folder),
            name=name,
            task=task,
            signature=_reward_signature() if is_reward else _policy_signature(),
            model_config={"function_to_apply": "none"} if is_reward else None,
            # Named, since MLflow would otherwise find them out by loading the model in another process.
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in _PACKAGES],
            tags={HASH_TAG: md5},
        )
    return str(logged.model_id)


@contextmanager
def _named_pipeline(task: str) -> Iterator[None]:
    """Show MLflow a pipeline class for a task.

    transformers 5.23 lists pipelines as dotted names, at which MLflow 3.17 stumbles; all it wants of
    the class is the name.
    """
    from transformers.pipelines import PIPELINE_REGISTRY

    tasks = PIPELINE_REGISTRY.supported_tasks
    listed = tasks[task]
    if isinstance(listed["impl"], str):
        tasks[task] = {**listed, "impl": type(listed["impl"].rsplit(".", 1)[-1], (), {})}
    try:
        yield
    finally:
        tasks[task] = listed


def import_without_torch() -> None:
    """Import what logging needs, but not torch: copying a model takes none of it, importing it takes seconds.

    Only for a process that will never load a model.
    """
    sys.modules.setdefault("torch", None)  # pyright: ignore[reportArgumentType]  (None is Python's word for "absent")
    from mlflow import transformers as flavour
    from transformers import AutoTokenizer, pipelines

    logging.getLogger(__name__).info("%s, %s and %s are ready", flavour.FLAVOR_NAME, AutoTokenizer, pipelines.__name__)


def _policy_signature() -> ModelSignature:
    """Prompts in, answers out; how long and how random is the caller's to say."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    params = [
        ParamSpec("max_new_tokens", "long", 128),
        ParamSpec("do_sample", "boolean", False),
        ParamSpec("temperature", "double", 1.0),
        ParamSpec("return_full_text", "boolean", False),
    ]
    return ModelSignature(Schema([ColSpec("string")]), Schema([ColSpec("string")]), ParamSchema(params))


def _reward_signature() -> ModelSignature:
    """Whole texts in, raw scores out."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    return ModelSignature(Schema([ColSpec("string")]), Schema([ColSpec("string", "label"), ColSpec("double", "score")]))
