"""What the quality of the rows kept means for the pipeline: figures, warnings, and problems that stop it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.data.expectations import NAMED, SHARES, SOUND, add_suite, build_quality_expectations, judge
from rlhf.data.quality.assessment import Assessment, assess
from rlhf.data.sources import Rows
from rlhf.params import QualityParams

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.data_context.data_context.file_data_context import FileDataContext

FINDINGS = {
    "near_duplicates": "nearly repeat another row of their split; drop the repeats",
    "contaminated": "of the held-out prompts stand in training texts; hold out others, or drop those texts",
    "repeats_prompt": "have an answer that holds the prompt; cut it out",
    "holds_other_answer": "have an answer that holds the other one; cut it out, or drop them",
}
"""What a share is of, and the remedy."""


@dataclass(frozen=True)
class Verdict:
    """One kind's figures, the names of its warnings, and what stops the pipeline, one sentence each."""

    metrics: dict[str, Any]
    problems: list[str]


def judge_quality(
    kept: Mapping[str, Mapping[str, Rows]], limits: QualityParams, context: FileDataContext
) -> dict[str, Verdict]:
    """Assess the sound rows of every kind, by split, and judge them with an expectation each, one page per kind."""
    assessed = assess(kept, limits.rows)
    return {kind: _judge(kind, own, limits, context) for kind, own in assessed.items()}


def _judge(kind: str, assessed: Assessment, limits: QualityParams, context: FileDataContext) -> Verdict:
    if not assessed.figures["rows"]:
        return Verdict(assessed.figures | {"failed": [], "warnings": []}, [])
    suite = add_suite(context, f"{kind} quality", build_quality_expectations(assessed.table.columns, limits))
    judgement = judge(context, _with_ids(assessed.table), suite, "kept")
    problems = [_problem(kind, name, assessed, limits) for name in judgement.failed]
    figures = assessed.figures | {"failed": judgement.failed, "warnings": judgement.warnings}
    return Verdict(figures, problems)


def _with_ids(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the row's id in place of a mark that is true, `-` for one that is false."""
    shown = table.copy()
    for name in NAMED:
        if name in table:
            shown[name] = table["id"].where(table[name].eq(True), SOUND).where(table[name].notna(), None)
    return shown


def _problem(kind: str, name: str, assessed: Assessment, limits: QualityParams, shown: int = 3) -> str:
    table, figures = assessed.table, assessed.figures
    if name in SHARES:
        examples = " ".join(table.loc[table[name].eq(True), "id"].iloc[:shown])
        stop = getattr(limits, name).stop
        return (
            f"{kind}: {figures[name]:.1%} {FINDINGS[name]} (such as {examples}), or raise "
            f"validate.quality.{name}.stop {stop:g}"
        )
    if name == "cyclic_share":
        return (
            f"{kind}: {figures[name]:.1%} of the triples that pairs belong to go round in a circle (such as "
            f"{' '.join(figures['cycles']['example'])}), above validate.quality.cycles.stop {limits.cycles.stop:g}; "
            "settle which answer is best, or raise it"
        )
    if name == "first_wins":
        return (
            f"{kind}: the answer shown first wins {figures['position']['share']:.1%} of the time, farther from a half "
            f"than validate.quality.position.stop {limits.position.stop:g}; show each pair in both orders, or raise it"
        )
    mark = name.removeprefix("style_")
    return (
        f"{kind}: {mark} of chosen and rejected differ by {figures['style'][mark]:.2f} standard deviations, beyond "
        f"validate.quality.style.stop {limits.style.stop:g}; balance the pairs, or raise it"
    )
