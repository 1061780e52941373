"""What Great Expectations asks of every kind of data, and its judgement on one table of measured rows."""

# Great Expectations documents its names under `expectations` but does not list them in `__all__`:
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.sources import REQUIRED
from rlhf.params import QualityLimits, QualityParams, ValidateParams

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations import ExpectationSuite
    from great_expectations.data_context.data_context.file_data_context import FileDataContext


@dataclass(frozen=True)
class Judgement:
    """What a suite found: the first reason of every broken row (by its place), and the outcome per expectation."""

    reasons: dict[int, str]
    passed: int
    failed: list[str]
    warnings: list[str]


NO_TIME = "20000101T000000.000000Z"
"""Stands for the time of a run, which DVC's log and MLflow know."""
_TIME = re.compile(r"\d{8}T\d{6}\.\d{6}Z")
_ANCHOR = re.compile(r"collapse-body-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LOGO = re.compile(r'src="https://great-expectations-web-assets[^"]*"')


def open_context(folder: Path) -> FileDataContext:
    """A file context of Great Expectations under `folder`, silent and without telemetry."""
    # Read when the package is imported; also keeps it from any network access.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="file", project_root_dir=folder)
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    return context


def save_data_docs(folder: Path, report: Path) -> None:
    """Replace the folder `report` by the HTML pages of the context under `folder`: equal rows give equal pages.

    What differs from run to run goes: times, random endings of anchors, and a logo that tells a server of each reader.
    """
    site = folder / "gx" / "uncommitted" / "data_docs" / "local_site"
    shutil.rmtree(report, ignore_errors=True)
    shutil.copytree(site, report)
    for page in report.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        text = _ANCHOR.sub("collapse-body", _LOGO.sub('src="data:,"', text))
        page.write_text(_TIME.sub(NO_TIME, text), encoding="utf-8")


def judge(context: FileDataContext, table: pd.DataFrame, suite: ExpectationSuite, stage: str) -> Judgement:
    """Run a suite on a table with a checkpoint that adds a page to the Data Docs; `stage` names the page.

    The table's column `row` tells which rows fail; a row's reason is that of the first expectation it fails. A table
    without one is judged as a whole, and the page shows some of the unexpected values.
    """
    import great_expectations as gx
    from great_expectations.checkpoint.actions import UpdateDataDocsAction
    from great_expectations.core.run_identifier import RunIdentifier

    name = f"{suite.name} {stage}"
    asset = context.data_sources.add_pandas(name).add_dataframe_asset(name)
    batch = asset.add_batch_definition_whole_dataframe(stage)
    validation = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=name,
            validation_definitions=[validation],
            actions=[UpdateDataDocsAction(name="data docs")],
            result_format={
                "result_format": "COMPLETE",
                "unexpected_index_column_names": ["row"],
                "include_unexpected_rows": False,
            }
            if "row" in table
            else {"result_format": "SUMMARY"},
        )
    )
    run = RunIdentifier(run_name=stage, run_time=datetime.strptime(NO_TIME, "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC))
    (result,) = checkpoint.run(batch_parameters={"dataframe": table}, run_id=run).run_results.values()
    return _read_judgement(result.results)


def _read_judgement(results: list[Any]) -> Judgement:
    reasons: dict[int, str] = {}
    failed: list[str] = []
    warnings: list[str] = []
    for result in results:
        meta = result.expectation_config.meta
        if result.exception_info.get("raised_exception"):
            raise RuntimeError(f"{meta['name']}: {result.exception_info['exception_message']}")
        if not result.success:
            (warnings if meta["kind"] == "warning" else failed).append(meta["name"])
        if meta["kind"] == "row":
            for unexpected in result.result.get("unexpected_index_list") or []:
                reasons.setdefault(int(unexpected["row"]), meta["name"])
    return Judgement(reasons, len(results) - len(failed) - len(warnings), failed, warnings)


def add_suite(context: FileDataContext, kind: str, expectations: list[Any]) -> ExpectationSuite:
    """The suite of one kind in the context, under the kind's name."""
    import great_expectations as gx

    return context.suites.add(gx.ExpectationSuite(name=kind, expectations=expectations))


def build_expectations(
    kind: str,
    limits: ValidateParams,
    context_length: int | None,
    scale: tuple[float, float] | None,
    has_answers: bool,
) -> list[Any]:
    """The expectations of one kind, in the order in which they give a broken row its reason.

    `meta.kind` is `row` (a failing row is set aside), `table` (stops the pipeline) or `warning`;
    `context_length` is the base model's, in tokens, where it has one; `scale` is that of ratings, where there is one.
    """
    text_columns = REQUIRED[kind]
    expectations = _schema(("row", "id", "split", *(f"{column}_characters" for column in text_columns)))
    for column in text_columns:
        expectations += _text_column(
            column, limits.max_prompt_tokens if column == "prompt" else limits.max_completion_tokens
        )
    return [
        *expectations,
        *_whole_row(kind, context_length),
        *_on_scale(kind, scale),
        *_repeats(limits),
        *_table(kind, limits, has_answers),
    ]


def _schema(columns: tuple[str, ...]) -> list[Any]:
    from great_expectations import expectations as gxe

    return [gxe.ExpectColumnToExist(column=column, meta=_meta("table", f"{column}_exists")) for column in columns]


def _meta(kind: str, name: str) -> dict[str, str]:
    return {"kind": kind, "name": name}


def _row(name: str) -> dict[str, str]:
    return _meta("row", name)


def _is_true(column: str, name: str) -> Any:
    from great_expectations import expectations as gxe

    return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[True], meta=_row(name))


def _text_column(column: str, max_tokens: int) -> list[Any]:
    from great_expectations import expectations as gxe

    return [
        gxe.ExpectColumnValuesToNotBeNull(column=f"{column}_characters", meta=_row(f"{column}_missing")),
        gxe.ExpectColumnValuesToBeInSet(
            column=f"{column}_form", value_set=["text", "messages"], meta=_row(f"{column}_not_text")
        ),
        gxe.ExpectColumnValuesToBeBetween(column=f"{column}_characters", min_value=1, meta=_row(f"{column}_empty")),
        _is_true(f"{column}_turns", f"{column}_turns"),
        gxe.ExpectColumnValuesToBeBetween(
            column=f"{column}_tokens", max_value=max_tokens, meta=_row(f"{column}_too_long")
        ),
    ]


def _whole_row(kind: str, context_length: int | None) -> list[Any]:
    from great_expectations import expectations as gxe

    checks = [_is_true("form_fits", "mixed_forms")]
    if context_length is not None:
        checks.append(
            gxe.ExpectColumnValuesToBeBetween(
                column="total_tokens", max_value=context_length, meta=_row("longer_than_context")
            )
        )
    if kind == "preferences":
        checks.append(_is_true("answers_differ", "chosen_equals_rejected"))
    return [*checks, _is_true("numbers_fit", "not_a_number")]


def _on_scale(kind: str, scale: tuple[float, float] | None) -> list[Any]:
    from great_expectations import expectations as gxe

    if kind != "ratings" or scale is None:
        return []
    low, high = scale
    return [
        gxe.ExpectColumnValuesToBeBetween(column="score", min_value=low, max_value=high, meta=_row("score_off_scale"))
    ]


def _repeats(limits: ValidateParams) -> list[Any]:
    from great_expectations import expectations as gxe

    duplicate = gxe.ExpectColumnValuesToBeInSet(
        column="is_duplicate", value_set=[False], mostly=1 - limits.max_duplicate_share, meta=_row("duplicate")
    )
    leak = gxe.ExpectColumnValuesToBeInSet(column="leaks", value_set=[False], meta=_row("leak"))
    repeated = gxe.ExpectColumnValuesToBeInSet(column="repeats_id", value_set=[False], meta=_row("repeated_id"))
    return [leak, duplicate, repeated]


def _table(kind: str, limits: ValidateParams, has_answers: bool) -> list[Any]:
    from great_expectations import expectations as gxe
    from great_expectations.expectations.metadata_types import FailureSeverity

    checks: list[Any] = [
        gxe.ExpectTableRowCountToBeBetween(min_value=limits.min_rows, meta=_meta("table", "too_few_rows")),
        gxe.ExpectColumnDistinctValuesToEqualSet(
            column="split", value_set=["train", "test"], meta=_meta("table", "empty_split")
        ),
    ]
    if kind == "preferences":
        share, bias = limits.max_contradiction_share, limits.max_length_bias
        checks += [
            gxe.ExpectColumnValuesToBeInSet(
                column="is_contradicted", value_set=[False], mostly=1 - share, meta=_meta("table", "contradictions")
            ),
            gxe.ExpectColumnMeanToBeBetween(
                column="longer_chosen",
                max_value=bias,
                severity=FailureSeverity.WARNING,
                meta=_meta("warning", "length_bias"),
            ),
        ]
    if has_answers:
        checks.append(
            gxe.ExpectColumnUniqueValueCountToBeBetween(
                column="answer", min_value=2, severity=FailureSeverity.WARNING, meta=_meta("warning", "single_answer")
            )
        )
    return checks


# quality ------------------------------------------------------------------------------------------

SHARES = ("near_duplicates", "contaminated", "repeats_prompt", "holds_other_answer")
"""Checks of single rows, each bounded by the limits of the same name; their columns hold `-`, or the id of a row that
fails, so that the page names some of them without a list of all."""
NAMED = (*SHARES, "on_cycle")
"""These, and one that is bounded by another figure."""
SOUND = "-"


def build_quality_expectations(columns: Iterable[str], limits: QualityParams) -> list[Any]:
    """What is expected of rows that are sound one by one, for those of the checks whose column there is.

    Every limit that is given makes an expectation: `warn` of the kind warning, `stop` of the kind table. A check
    without any makes one that cannot fail, so that the page shows what was found.
    """
    present = list(columns)
    checks = [
        _marked(name, kind, bound)
        for name in SHARES
        if name in present
        for kind, bound in _bounds(getattr(limits, name), anything=1.0)
    ]
    if "on_cycle" in present:
        checks.append(_marked("on_cycle", "warning", 1.0))
    means = [(name, limits.style, 0.0) for name in present if name.startswith("style_")]
    means += [("cyclic_share", limits.cycles, 0.0)] if "cyclic_share" in present else []
    means += [("first_wins", limits.position, 0.5)] if "first_wins" in present else []
    return checks + [
        _mean_near(name, kind, middle, bound)
        for name, own, middle in means
        for kind, bound in _bounds(own, anything=float("inf"))
    ]


def _bounds(limits: QualityLimits, anything: float) -> list[tuple[str, float]]:
    given = [("warning", limits.warn), ("table", limits.stop)]
    return [(kind, bound) for kind, bound in given if bound is not None] or [("warning", anything)]


def _severity(kind: str) -> Any:
    from great_expectations.expectations.metadata_types import FailureSeverity

    return FailureSeverity.WARNING if kind == "warning" else FailureSeverity.CRITICAL


def _marked(name: str, kind: str, most: float) -> Any:
    from great_expectations import expectations as gxe

    return gxe.ExpectColumnValuesToBeInSet(
        column=name, value_set=[SOUND], mostly=1 - most, severity=_severity(kind), meta=_meta(kind, name)
    )


def _mean_near(name: str, kind: str, middle: float, distance: float) -> Any:
    from great_expectations import expectations as gxe

    return gxe.ExpectColumnMeanToBeBetween(
        column=name,
        min_value=middle - distance,
        max_value=middle + distance,
        severity=_severity(kind),
        meta=_meta(kind, name),
    )
