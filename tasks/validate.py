"""The stage `validate`: sound rows go on, broken rows are set aside with their reason, too many stop the pipeline."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from rlhf.curves import Log, write_json
from rlhf.data.expectations import open_context, save_data_docs
from rlhf.data.formats import SPLITS, write_rows
from rlhf.data.quality.verdict import Verdict, judge_quality
from rlhf.data.quarantine import (
    Outcome,
    Yardstick,
    find_shared_prompts,
    kept_rows,
    quarantined_rows,
    read_prepared,
    sift_rows,
)
from rlhf.data.sources import Rows
from rlhf.errors import UserError
from rlhf.models import load_tokenizer
from rlhf.params import Params
from tasks.paths import KINDS, Paths

logger = logging.getLogger(__name__)


def run(params: Params, paths: Paths, _log: Log) -> None:
    """Read data/prepared, write data/validated, data/quarantine, reports/validate and metrics/validate.json.

    Quarantine, report and metrics are written before a gate raises UserError; data/validated only if all pass.
    """
    present = [kind for kind in KINDS if getattr(params.prepare.data, kind) is not None]
    prepared = {kind: read_prepared(paths.prepared / kind, paths.root) for kind in present}
    base = paths.model("base")
    tokenizer = load_tokenizer(base)
    with tempfile.TemporaryDirectory() as folder:
        context = open_context(Path(folder))
        yardstick = Yardstick(params.validate_, tokenizer, _context_length(base), context, _scale(params))
        outcomes = {kind: sift_rows(prepared[kind], kind, yardstick) for kind in present}
        kept = {kind: _kept(prepared[kind], outcomes[kind]) for kind in present}
        verdicts = judge_quality(kept, params.validate_.quality, context)
        save_data_docs(Path(folder), paths.report("validate"))
    for kind in KINDS:
        broken = quarantined_rows(prepared[kind], outcomes[kind]) if kind in outcomes else []
        write_rows(paths.quarantine / f"{kind}.jsonl", broken)
    problems = [problem for kind in present for problem in outcomes[kind].problems + verdicts[kind].problems]
    write_json(paths.metrics("validate"), _metrics(outcomes, verdicts, problems))
    if problems:
        raise UserError("\n".join(problems))
    for kind in KINDS:
        for split in SPLITS:
            write_rows(paths.rows(kind, split), kept[kind][split] if kind in kept else [])


def _kept(rows: Mapping[str, Rows], outcome: Outcome) -> dict[str, Rows]:
    """The sound rows of both splits, read anew by every loop."""
    counts = outcome.metrics["kept"]
    return {split: Rows(partial(kept_rows, rows, outcome, split), counts[split]) for split in SPLITS}


def _metrics(outcomes: dict[str, Outcome], verdicts: dict[str, Verdict], problems: list[str]) -> dict[str, object]:
    warnings = [f"{kind}: {name}" for kind, outcome in outcomes.items() for name in outcome.metrics["warnings"]]
    warnings += [f"{kind}: {name}" for kind, verdict in verdicts.items() for name in verdict.metrics["warnings"]]
    warnings += find_shared_prompts({kind: outcome.prompts for kind, outcome in outcomes.items()})
    for warning in warnings:
        logger.warning("%s", warning)
    figures = {
        kind: {
            **outcome.metrics,
            "quality": verdicts[kind].metrics,
            "success": outcome.metrics["success"] and not verdicts[kind].problems,
        }
        for kind, outcome in outcomes.items()
    }
    return {**figures, "warnings": warnings, "problems": problems, "success": not problems}


def _scale(params: Params) -> tuple[float, float] | None:
    """The least and the greatest rating, where they are declared."""
    ratings = params.reward.ratings
    return (ratings.low, ratings.high) if ratings else None


def _context_length(base: Path) -> int | None:
    """How many tokens the base model can read, where its configuration says so."""
    path = base / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return config.get("max_position_embeddings") or config.get("n_positions")
