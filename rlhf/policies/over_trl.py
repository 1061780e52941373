"""The frame of every training by one of TRL's trainers: settings, adapter, curves, watch, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from rlhf.curves import CurveRecorder
from rlhf.models import lora_config, target_modules_named, trainer_settings
from rlhf.params import TrainingParams
from rlhf.policies import PolicyFiles, Run, Settings
from rlhf.policies.prefixes import shared_prefixes
from rlhf.policies.resuming import make_resumable
from rlhf.team import Team, shared_folder
from rlhf.training import finished_policy, report_curves


def train_over_trl(
    params: TrainingParams,
    files: PolicyFiles,
    run: Run,
    trainer: Callable[..., Any],
    arguments: Callable[[Settings], dict[str, Any]],
) -> PreTrainedModel:
    """The policy after one of TRL's trainers; `arguments` makes of the common settings what it takes besides.

    Raises UserError where the adapter names modules that the model lacks.
    """
    curves = CurveRecorder(run.log)
    with shared_folder(run.team) as folder, shared_prefixes() as share:
        made = arguments(trainer_settings(params, run.seed, folder))
        if run.team.size > 1:
            made["train_dataset"] = _in_one_place(made["train_dataset"], run.team, folder / "rows")
        for model in (made["model"], made.get("ref_model")):
            share(model)
        build = target_modules_named(params.adapter)(trainer)
        built = build(
            **made,
            peft_config=lora_config(params.adapter, "CAUSAL_LM"),
        )
        for model in (built.model, getattr(built, "ref_model", None)):
            share(model)  # those that the trainer has loaded itself
        report_curves(built, curves)
        for callback in run.callbacks:
            built.add_callback(callback)
        make_resumable(built, run.checkpoints, curves=curves, **run.parts)
        built.train()
    return finished_policy(built.model, params, files.sft, made["processing_class"])


def _in_one_place(rows: Dataset, team: Team, folder: Path) -> Dataset:
    """The same rows, read from a folder of the main process: TRL leaves beside them what one process has computed for
    all.
    """
    team.from_main(lambda: rows.save_to_disk(folder))
    return Dataset.load_from_disk(folder)
