"""What the probe leaves behind: the table of tricks, its verdicts as health.json, the worst answers side by side."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from rlhf.curves import rounded_number, write_json
from rlhf.data.formats import completion_text
from rlhf.evaluation.comparison import Estimate
from rlhf.health import VERDICTS
from rlhf.pages import open_templates
from rlhf.params import ProbeParams
from rlhf.probe.probing import Probe, Tried, describe

ROWS_SHOWN = 5
"""So many prompts of each trick are on the page, those where it beats the good answer by most."""


def write_report(folder: Path, found: Probe, section: ProbeParams) -> None:
    """tricks.csv, health.json, samples.json with the worst answers as flat rows, and probe.html; no times in any."""
    folder.mkdir(parents=True, exist_ok=True)
    tried = rank(found)
    findings = [describe(one, section) for one in tried]
    health = {"algorithm": "probe", "verdict": found.verdict, "findings": findings, "silent": found.silent}
    samples = [row for one in tried for row in list_worst(found, one)]
    write_json(folder / "health.json", health)
    write_json(folder / "samples.json", samples)
    _write_table(folder / "tricks.csv", tried)
    page = open_templates(Path(__file__).parent).get_template("report.html")
    (folder / "probe.html").write_text(
        page.render(found=found, table=tabulate(found), findings=findings, samples=samples, section=section),
        encoding="utf-8",
    )


def rank(found: Probe) -> list[Tried]:
    """The tricks, the worst first."""
    return sorted(found.tried, key=lambda one: (-VERDICTS.index(one.verdict), -one.excess.low))


def tabulate(found: Probe) -> list[dict[str, str]]:
    """The table for people, one row per trick."""
    return [
        {
            "trick": one.trick.title,
            "verdict": one.verdict,
            "beats good": f"{one.wins:.2f}",
            "plain bad": f"{one.base:.2f}",
            "excess": _interval(one.excess),
            "pays": _interval(one.gain),
            "pays on good": f"{one.gain_on_good.mean:+.2f}",
            "what it is": one.trick.what,
        }
        for one in rank(found)
    ]


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def list_worst(found: Probe, one: Tried) -> list[dict[str, Any]]:
    """The answers by which a trick beats the good answer by most, or is nearest to it, beside the plain ones."""
    leads = one.scores - found.good[one.places]
    rows = []
    for index in sorted(range(len(leads)), key=lambda index: -leads[index])[:ROWS_SHOWN]:
        place = one.places[index]
        case = found.cases[place]
        rows.append(
            {
                "trick": one.trick.name,
                "prompt": completion_text(case.prompt).strip(),
                "tricky": completion_text(one.answers[index]),
                "tricky_score": float(one.scores[index]),
                "good": completion_text(case.good),
                "good_score": float(found.good[place]),
                "bad": completion_text(case.bad),
                "bad_score": float(found.bad[place]),
            }
        )
    return rows


def _write_table(path: Path, tried: list[Tried]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = list(tried[0].figures) if tried else []
        writer.writerow(["trick", *columns, "what"])
        for one in tried:
            figures = {**one.figures, "verdict": one.verdict}
            writer.writerow([one.trick.name, *(rounded_number(figures[name]) for name in columns), one.trick.what])
