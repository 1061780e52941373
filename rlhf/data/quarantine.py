"""Telling sound rows from broken ones, the figures about both, and when the pipeline must stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.expectations import Judgement, add_suite, build_expectations, judge
from rlhf.data.files import read_file
from rlhf.data.formats import SPLITS, Row, row_id
from rlhf.data.measurements import add_pair_columns, measure
from rlhf.data.sources import Rows
from rlhf.params import ValidateParams

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from great_expectations.data_context.data_context.file_data_context import FileDataContext
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Yardstick:
    """What every kind is held against; `context_length` is the base model's, in tokens, or None.

    `scale` is the least and the greatest rating, or None where none is declared.
    """

    limits: ValidateParams
    tokenizer: PreTrainedTokenizerBase
    context_length: int | None
    expectations: FileDataContext
    scale: tuple[float, float] | None = None


@dataclass(frozen=True)
class Outcome:
    """One kind judged. By split: why rows are broken, by their number, and the keys of the kept prompts."""

    reasons: Mapping[str, Mapping[int, str]]
    prompts: Mapping[str, np.ndarray]
    metrics: dict[str, Any]
    problems: list[str]


def read_prepared(folder: Path, root: Path) -> dict[str, Rows]:
    """The rows of both splits, read anew by every loop; an empty file has none.

    Raises UserError for a missing file, and as it is read for a malformed one.
    """
    return {split: _read(folder / f"{split}.jsonl", root) for split in SPLITS}


def _read(path: Path, root: Path) -> Rows:
    if path.exists() and path.stat().st_size == 0:
        return Rows(lambda: iter(()))
    records = read_file(path, str(path.relative_to(root)))
    return Rows(lambda: (row for _, row in records))


def sift_rows(rows: Mapping[str, Iterable[Row]], kind: str, yardstick: Yardstick) -> Outcome:
    """Say which rows of one kind are broken, and judge what is left.

    Every row read is either kept or quarantined, and a quarantined row has one reason: the first check it fails.
    """
    table = measure(rows, kind, yardstick.tokenizer)
    expectations = build_expectations(
        kind, yardstick.limits, yardstick.context_length, yardstick.scale, "answer" in table
    )
    suite = add_suite(yardstick.expectations, kind, expectations)
    as_read = judge(yardstick.expectations, table, suite, "as read")
    sound = table.loc[~table["row"].isin(list(as_read.reasons))].copy()
    if kind == "preferences":
        add_pair_columns(sound)  # a row whose opposite was set aside is contradicted no more
    final = as_read if len(sound) == len(table) else judge(yardstick.expectations, sound, suite, "kept")
    prompts = {split: sound.loc[sound["split"] == split, "prompt_key"].to_numpy() for split in SPLITS}
    metrics = _figures(kind, len(table), sound, as_read, final)
    problems = _problems(kind, metrics, as_read, table, yardstick.limits)
    if not problems:
        problems = [f"{kind}: the rows kept fail the expectation {name}; see reports/validate" for name in final.failed]
    first = {split: int((table["split"] == split).to_numpy().argmax()) if len(table) else 0 for split in SPLITS}
    reasons: dict[str, dict[int, str]] = {split: {} for split in SPLITS}
    for place, split in zip(as_read.reasons, table["split"].iloc[list(as_read.reasons)], strict=True):
        reasons[split][place - first[split]] = as_read.reasons[place]
    return Outcome(reasons, prompts, metrics | {"success": not problems}, problems)


def quarantined_rows(rows: Mapping[str, Iterable[Row]], outcome: Outcome) -> Iterator[Row]:
    """The broken rows in the order read, each with `reason` and `split`."""
    for split, members in rows.items():
        reasons = outcome.reasons[split]
        for number, row in enumerate(members if reasons else ()):
            if number in reasons:
                yield _label(row, str(row.get("id") or row_id(row)), split, reasons[number])


def kept_rows(rows: Mapping[str, Iterable[Row]], outcome: Outcome, split: str) -> Iterator[Row]:
    """The sound rows of a split, unchanged and in order."""
    return (row for number, row in enumerate(rows[split]) if number not in outcome.reasons[split])


def _label(row: Row, identity: str, split: str, reason: str) -> Row:
    """The row with its reason first; columns of its own by our names move to `source_<name>`."""
    own = {
        (f"source_{name}" if name in ("reason", "split") else name): value
        for name, value in row.items()
        if name != "id"
    }
    return {"id": identity, "reason": reason, "split": split, **own}


def _figures(kind: str, read: int, sound: Any, as_read: Judgement, final: Judgement) -> dict[str, Any]:
    # `sound` is a table; pandas' own types are unions that no checker follows.
    reasons = Counter(as_read.reasons.values())
    figures: dict[str, Any] = {
        "rows_read": read,
        "rows_kept": len(sound),
        "rows_quarantined": sum(reasons.values()),
        "quarantined": dict(sorted(reasons.items())),
        "kept": {split: int((sound["split"] == split).sum()) for split in SPLITS},
        "duplicate_share": reasons["duplicate"] / read if read else 0.0,
        "longest_prompt_tokens": int(sound["prompt_tokens"].max()) if len(sound) else 0,
        "expectations_as_read": {"passed": as_read.passed, "failed": as_read.failed},
        "expectations_kept": {"passed": final.passed, "failed": final.failed},
        "warnings": final.warnings,
    }
    if kind == "preferences":
        lengths = sound["longer_chosen"].dropna()
        figures["contradiction_share"] = float(sound["is_contradicted"].mean()) if len(sound) else 0.0
        figures["length_bias"] = float(lengths.mean()) if len(lengths) else None
    if kind == "ratings" and len(sound):
        figures |= {"mean_score": float(sound["score"].mean()), "median_score": float(sound["score"].median())}
    if "answer" in sound and len(sound):
        figures["commonest_answer_share"] = float(sound["answer"].value_counts(normalize=True).iloc[0])
    return figures


def _problems(
    kind: str, metrics: dict[str, Any], as_read: Judgement, table: pd.DataFrame, limits: ValidateParams
) -> list[str]:
    """What stops the pipeline, one sentence each; duplicates have a gate of their own."""
    read, duplicates = metrics["rows_read"], metrics["quarantined"].get("duplicate", 0)
    broken = metrics["rows_quarantined"] - duplicates
    file = f"data/quarantine/{kind}.jsonl"
    if not read:
        return [f"{kind}: data/prepared/{kind} has no rows; give prepare.data.{kind} a source with rows"]
    examples = _commonest(as_read, table)
    if not metrics["rows_kept"]:
        return [f"{kind}: all {read} rows are quarantined ({examples}); read {file} and mend the source"]
    if broken / read > limits.max_quarantined_share:
        problem = (
            f"{kind}: {broken} of {read} rows ({broken / read:.1%}) are broken, above validate.max_quarantined_share "
            f"{limits.max_quarantined_share:g} ({examples}); read {file} and mend the source, or raise the limit"
        )
        return [problem]
    problems: list[str] = []
    if metrics["duplicate_share"] > limits.max_duplicate_share:
        problems.append(
            f"{kind}: {duplicates} of {read} rows repeat another, above validate.max_duplicate_share "
            f"{limits.max_duplicate_share:g} ({examples}); drop the repeats listed in {file}, or raise the limit"
        )
    return problems + _problems_of_kept(kind, metrics, examples, limits)


def _problems_of_kept(kind: str, metrics: dict[str, Any], examples: str, limits: ValidateParams) -> list[str]:
    problems: list[str] = []
    contradicted = metrics.get("contradiction_share", 0.0)
    if contradicted > limits.max_contradiction_share:
        problems.append(
            f"{kind}: {contradicted:.1%} of the rows kept are contradicted by another row, above "
            f"validate.max_contradiction_share {limits.max_contradiction_share:g}; "
            "settle which answer wins, or raise the limit"
        )
    if metrics["rows_kept"] < limits.min_rows:
        problems.append(
            f"{kind}: {metrics['rows_kept']} rows are left of {metrics['rows_read']}, fewer than validate.min_rows "
            f"{limits.min_rows}; add rows or lower it"
        )
    for split in (split for split, count in metrics["kept"].items() if not count):
        problems.append(
            f"{kind}: no row is left for {split} ({examples or 'none was prepared'}); "
            f"change prepare.data.{kind}.test_share or add rows"
        )
    return problems


def _commonest(as_read: Judgement, table: pd.DataFrame, shown: int = 3) -> str:
    """The most frequent reasons, each with its count and up to three row ids."""
    counts = Counter(as_read.reasons.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:shown]
    ids = table["id"].tolist()
    parts: list[str] = []
    for reason, count in ordered:
        rows = [ids[row] for row in sorted(as_read.reasons) if as_read.reasons[row] == reason][:shown]
        parts.append(f"{reason} {count}, such as {' '.join(rows)}")
    return "; ".join(parts)


def find_shared_prompts(prompts: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Warnings about evaluation prompts on which demonstrations, preferences or ratings train: scores there flatter.

    `prompts` holds the keys of the kept prompts by kind and split.
    """
    held_out = set(prompts["prompts"]["test"]) if "prompts" in prompts else set[int]()
    warnings: list[str] = []
    for kind in ("sft", "preferences", "ratings"):
        seen = held_out & set(prompts[kind]["train"]) if kind in prompts else ()
        if seen:
            warnings.append(
                f"{kind}: {len(seen)} of {len(held_out)} evaluation prompts also stand in its training rows"
            )
    return warnings
