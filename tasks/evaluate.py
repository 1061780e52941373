"""The stage `evaluate`: the SFT model and every policy under one yardstick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.curves import Log, write_json
from rlhf.errors import UserError
from rlhf.params import Params
from tasks.paths import Paths, refuse_unwatched


def run(params: Params, paths: Paths, log: Log) -> None:
    """Read models and held-out rows; write metrics/evaluate.json, one object per policy, and reports/evaluate.

    Raises UserError where a model is missing.
    """
    from rlhf.evaluation.frontier import trace_frontier
    from rlhf.evaluation.prompts import GoldFiles, gold_files
    from rlhf.evaluation.report import Trainings, write_report
    from rlhf.evaluation.yardstick import SFT, EvaluationFiles, evaluate_policies

    policies = {SFT: paths.model("sft")} | {name: paths.model("policy", name) for name in params.policies}
    for name, folder in policies.items():
        if not (folder / "config.json").exists():
            raise UserError(f"{folder.relative_to(paths.root)} holds no model; run `dvc repro` to train {name} first")
    trained = {name: paths.report("policy", name) for name in params.policies}
    judged = {name: paths.report(name) for name in ("sft", "reward", "probe")} | trained
    counted = {name: paths.report(name) for name in ("sft", "embed")} | trained
    trainings = Trainings(
        validation=_read_report(paths.metrics("validate"), paths.root),
        health={name: _read_report(folder / "health.json", paths.root) for name, folder in judged.items()},
        ledgers={name: _read_report(folder / "ledger.json", paths.root) for name, folder in counted.items()},
        examples=_read_report(paths.report("sft") / "trained_on.json", paths.root),
    )
    files = EvaluationFiles(
        policies=policies,
        reward=paths.reward_model,  # without one proxy rewards are null
        gold=GoldFiles(sft=paths.model("sft"), judge=paths.model("judge"), root=paths.root),
        prompts=paths.rows("prompts", "test"),
        preferences=paths.rows("preferences", "test"),
    )
    refuse_unwatched(paths, "evaluate", "evaluate.gold", gold_files(params.evaluate))
    yardstick, measured = evaluate_policies(params.evaluate, files, params.seed)
    curves = {name: folder / "curves.csv" for name, folder in trained.items()}
    frontier = trace_frontier(yardstick, measured, curves)
    for name, one in measured.items():
        one.metrics["frontier_area"] = frontier.area(name, params.evaluate.kl_budget)
    samples = write_report(paths.report("evaluate"), yardstick, measured, frontier, trainings)
    write_json(paths.report("evaluate") / "samples.json", samples)
    metrics = {name: one.metrics for name, one in measured.items()}
    write_json(paths.metrics("evaluate"), metrics)
    for name, figures in metrics.items():
        log({f"{name}/{key}": float(value) for key, value in figures.items() if isinstance(value, (int, float))}, 0)


def _read_report(path: Path, root: Path) -> Any:
    if not path.exists():
        raise UserError(f"{path.relative_to(root)} does not exist; run `dvc repro` to train what it describes")
    return json.loads(path.read_text(encoding="utf-8"))
