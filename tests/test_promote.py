"""Promotion: the gate, the comparison with the champion, idempotence, lineage, and what cannot be promoted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from rlhf.errors import UserError
from rlhf.params import Params, PromoteParams
from rlhf.params_file import load_params
from tasks import promote
from tasks.paths import Paths
from tasks.tracking import lineage, store
from tasks.tracking.models import HASH_TAG

# MLflow 3.17 warns of itself, with the newest SQLAlchemy and pandas.
pytestmark = pytest.mark.filterwarnings(r"ignore:::mlflow(\.|$)")

ROOT = Path(__file__).resolve().parents[1]
POLICY, REWARD = "alignflow-policy", "alignflow-reward"


@pytest.fixture(scope="module")
def params() -> Params:
    gate = PromoteParams(min_win_rate_low=0.5, policy_name=POLICY, reward_name=REWARD)
    return load_params(ROOT / "params.yaml").model_copy(update={"promote": gate})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal model with a tokenizer of one word."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({"<eos>": 0, "word": 1}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=2, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store.quieten_mlflow()
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def paths(tmp_path: Path, migrated_store: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A workspace with two policies, a reward model and their evaluation."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", lineage.PARENT_KEY, lineage.FLOW_RUN):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(migrated_store, tmp_path / "mlruns/mlflow.db")
    workspace = Paths(tmp_path)
    for folder in (workspace.model("policy", "dpo"), workspace.model("policy", "ppo"), workspace.model("reward")):
        shutil.copytree(model, folder)
        _retrain(folder, folder.name)
    _evaluate(workspace, ppo=(0.7, 0.55), dpo=(0.6, 0.52))
    (tmp_path / "metrics/validate.json").write_text('{"success": true}')
    (tmp_path / "metrics/reward.json").write_text('{"accuracy": 0.75}')
    return workspace


def _retrain(folder: Path, mark: str) -> None:
    """Make a model another one, by hash."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mark": mark}))


def _evaluate(paths: Paths, **policies: tuple[float, float]) -> None:
    figures = {
        name: {"gold_reward": gold, "win_rate_low": low, "kl_to_sft": 1.5} for name, (gold, low) in policies.items()
    }
    paths.metrics("evaluate").parent.mkdir(exist_ok=True)
    paths.metrics("evaluate").write_text(json.dumps(figures | {"sft": {"gold_reward": 0.9, "win_rate_low": 0.5}}))


def _client(paths: Paths) -> MlflowClient:
    return store.connect(store.tracking_uri(paths), paths)[0]


def test_the_best_policy_becomes_champion_with_its_lineage_and_a_second_time_nothing_happens(
    paths: Paths, params: Params
) -> None:
    policy, reward = promote.promote(params, paths)
    assert policy == f"{POLICY}: ppo (gold reward 0.7) is version 1, the first champion"
    assert reward == f"{REWARD}: the reward model is version 1"
    client = _client(paths)
    version = client.get_model_version_by_alias(POLICY, "champion")
    assert version.tags[HASH_TAG] == lineage.hash_path(paths.model("policy", "ppo"))
    assert version.tags["metric.gold_reward"] == "0.7"
    assert version.tags["alignflow.git_commit"] == "none"
    assert version.tags["alignflow.validation_success"] == "true"
    assert version.tags["alignflow.params_hash"] == lineage.params_hash(params)
    reward_version = client.get_model_version_by_alias(REWARD, "champion")
    assert reward_version.tags["metric.accuracy"] == "0.75"

    runs = len(client.search_runs(["1"]))
    assert promote.promote(params, paths) == [
        f"{POLICY}: ppo is the champion already (version 1); nothing to do",
        f"{REWARD}: the reward model is version 1 already; nothing to do",
    ]
    assert len(client.search_model_versions(f"name = '{POLICY}'")) == 1
    assert len(client.search_runs(["1"])) == runs


def test_without_a_reward_model_the_policy_is_promoted_alone(paths: Paths, params: Params) -> None:
    shutil.rmtree(paths.model("reward"))
    paths.model("reward").mkdir()
    (paths.model("reward") / "README").write_text("no preferences, so no reward model")
    assert promote.promote(params, paths) == [f"{POLICY}: ppo (gold reward 0.7) is version 1, the first champion"]
    assert not _client(paths).search_registered_models(f"name = '{REWARD}'")


def test_a_registered_version_loads(paths: Paths, params: Params) -> None:
    from mlflow import transformers as flavour

    promote.promote(params, paths)
    loaded: Any = flavour.load_model(f"models:/{POLICY}@champion")
    assert loaded.model.config.mark == "ppo"


def test_a_challenger_must_beat_the_champion(paths: Paths, params: Params) -> None:
    promote.promote(params, paths)
    _retrain(paths.model("policy", "ppo"), "worse")
    _evaluate(paths, ppo=(0.65, 0.55), dpo=(0.6, 0.52))
    decision = promote.promote(params, paths)[0]
    assert (
        decision == f"{POLICY}: ppo (gold reward 0.65) does not beat the champion, version 1 (0.7); the champion stays"
    )
    assert str(_client(paths).get_model_version_by_alias(POLICY, "champion").version) == "1"

    _retrain(paths.model("policy", "dpo"), "better")
    _evaluate(paths, ppo=(0.65, 0.55), dpo=(0.8, 0.52))
    assert promote.promote(params, paths)[0] == f"{POLICY}: dpo (gold reward 0.8) is version 2, beating version 1 (0.7)"
    assert str(_client(paths).get_model_version_by_alias(POLICY, "champion").version) == "2"


def test_a_beaten_champion_does_not_return(paths: Paths, params: Params, model: Path) -> None:
    promote.promote(params, paths)
    _evaluate(paths, dpo=(0.8, 0.6))
    promote.promote(params, paths)
    _evaluate(paths, ppo=(0.9, 0.6))
    assert promote.promote(params, paths)[0] == f"{POLICY}: ppo is version 1 and was beaten before; nothing to do"


def test_a_promotion_that_died_before_the_crown_is_completed(
    paths: Paths, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tasks.tracking.registry.Registry.crown", die)
        with pytest.raises(KeyboardInterrupt):
            promote.promote(params, paths)
    assert "the first champion" in promote.promote(params, paths)[0]
    assert str(_client(paths).get_model_version_by_alias(POLICY, "champion").version) == "1"


def test_nobody_passes_the_gate(paths: Paths, params: Params) -> None:
    _evaluate(paths, ppo=(0.7, 0.5), dpo=(0.9, 0.31))
    assert promote.promote(params, paths)[0] == (
        "no policy passes the gate: the best lower bound of a win rate is 0.5 (ppo), not above 0.5"
    )
    assert _client(paths).search_model_versions(f"name = '{POLICY}'") == []


def test_a_version_points_at_the_run_that_logged_the_model(paths: Paths, params: Params) -> None:
    from tasks.tracking.models import log_model

    client, experiment = store.connect(store.tracking_uri(paths), paths)
    folder = paths.model("policy", "ppo")
    run = client.create_run(experiment, run_name="policy@ppo").info.run_id
    log_model(client, run, folder, lineage.hash_path(folder))
    promote.promote(params, paths)
    assert client.get_model_version_by_alias(POLICY, "champion").run_id == run


def test_only_the_model_that_was_evaluated(paths: Paths, params: Params) -> None:
    (paths.root / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  evaluate:\n    deps:\n    - {path: models/policy/ppo, hash: md5, md5: other.dir}\n"
    )
    with pytest.raises(UserError, match=r"models/policy/ppo has the hash .* but other.dir was evaluated"):
        promote.promote(params, paths)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist"),
        ("{", "line 1: not valid JSON"),
        ('{"ppo": {"gold_reward": 0.5}}', "ppo.win_rate_low is None, not a number"),
        ('{"ppo": {"gold_reward": NaN, "win_rate_low": 1}}', "ppo.gold_reward is nan, not a number"),
        ('{"gone": {"gold_reward": 0.5, "win_rate_low": 0.9}}', "models/policy/gone does not exist"),
    ],
)
def test_what_cannot_be_promoted(paths: Paths, params: Params, content: str | None, sentence: str) -> None:
    path = paths.metrics("evaluate")
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        promote.promote(params, paths)


def test_a_registry_that_is_down_is_an_error(paths: Paths, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"registry at http://127.0.0.1:9 does not answer"):
        promote.promote(params, paths)
