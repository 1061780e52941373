"""The stage `evaluate`: the SFT model and every policy under one yardstick."""

from __future__ import annotations

from rlhf.curves import Log, write_json
from rlhf.errors import UserError
from rlhf.params import Params
from tasks.paths import Paths


def run(params: Params, paths: Paths, log: Log) -> None:
    """Read models and held-out rows; write metrics/evaluate.json, one object per policy, and reports/evaluate.

    Raises UserError where a model is missing.
    """
    from rlhf.evaluation.report import write_report
    from rlhf.evaluation.yardstick import SFT, EvaluationFiles, evaluate_policies

    policies = {SFT: paths.model("sft")} | {name: paths.model("policy", name) for name in params.policies}
    for name, folder in policies.items():
        if not (folder / "config.json").exists():
            raise UserError(f"{folder.relative_to(paths.root)} holds no model; run `dvc repro` to train {name} first")
    reward = paths.model("reward")
    files = EvaluationFiles(
        policies=policies,
        # Without preferences the stage reward leaves a note instead of a model, and proxy rewards are null.
        reward=reward if (reward / "config.json").exists() else None,
        judge=paths.model("judge"),
        prompts=paths.rows("prompts", "test"),
        preferences=paths.rows("preferences", "test"),
    )
    yardstick, measured = evaluate_policies(params.evaluate, files, params.seed)
    write_json(paths.report("evaluate") / "samples.json", write_report(paths.report("evaluate"), yardstick, measured))
    metrics = {name: one.metrics for name, one in measured.items()}
    write_json(paths.metrics("evaluate"), metrics)
    for name, figures in metrics.items():
        log({f"{name}/{key}": float(value) for key, value in figures.items() if isinstance(value, (int, float))}, 0)
