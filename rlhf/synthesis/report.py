"""What a synthesis leaves behind: its ledger, how what it made is biased, and both as one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.curves import write_json
from rlhf.data.formats import Row, completion_text
from rlhf.data.quality.answers import STYLE, last_turn, standardise
from rlhf.pages import open_templates
from rlhf.synthesis.overlap import split_words
from rlhf.synthesis.tally import Tally

QUANTILES = {"least": 0.0, "median": 0.5, "p90": 0.9, "most": 1.0}
OPENINGS = 10
"""So many of the commonest opening words are named."""
SHOWN = 10
"""Rows on the page, evenly spread."""
Table = list[dict[str, Any]]


def report_folder(out: Path) -> Path:
    """The folder beside the file."""
    return out.with_name(f"{out.stem}-report")


def write_report(out: Path, tallies: Mapping[str, Tally], bias: Mapping[str, Table], rows: Sequence[Row]) -> Path:
    """ledger.json, bias.json and report.html in the folder beside `out`; returns the folder."""
    folder = report_folder(out)
    ledger = {name: tally.figures() for name, tally in tallies.items()}
    write_json(folder / "ledger.json", ledger)
    write_json(folder / "bias.json", bias)
    columns = ("prompt", "completion", "chosen", "rejected")
    step = max(1, len(rows) // SHOWN)
    samples = [{name: completion_text(row[name]) for name in columns if name in row} for row in rows[::step][:SHOWN]]
    tables = {f"Ledger of {name}": _booked(tally) for name, tally in tallies.items()} | dict(bias)
    page = open_templates(Path(__file__).parent).get_template("report.html")
    (folder / "report.html").write_text(page.render(name=out.name, tables=tables, samples=samples), encoding="utf-8")
    return folder


def _booked(tally: Tally) -> Table:
    rows = [{"what": "made", "count": tally.made, "share": None, "such as": ""}, {"what": "kept", "count": tally.kept}]
    rows += [
        {"what": f"left out: {reason}", "count": count, "such as": tally.examples[reason][0]}
        for reason, count in tally.left_out.most_common()
    ]
    return [row | {"share": row["count"] / max(1, tally.made)} for row in rows]


def instruction_bias(seeds: Sequence[Row], made: Sequence[Row]) -> dict[str, Table]:
    """How long seeds and what was made are, in words, and with which words their instructions open."""
    lengths = [
        {"what": f"{column} of {name}", **_quantiles([len(split_words(text)) for text in _said(rows, column)])}
        for column in ("prompt", "completion")
        for name, rows in (("seeds", seeds), ("made", made))
        if rows
    ]
    openings = [{"rows": name, **row} for name, rows in (("seeds", seeds), ("made", made)) for row in _openings(rows)]
    return {"Lengths in words": lengths, "Commonest opening words": openings}


def _said(rows: Sequence[Row], column: str) -> list[str]:
    return [last_turn(row["prompt"]) if column == "prompt" else completion_text(row[column]) for row in rows]


def _openings(rows: Sequence[Row]) -> Table:
    counts = Counter(words[0] for text in _said(rows, "prompt") if (words := split_words(text)))
    return [{"word": word, "share": count / len(rows)} for word, count in counts.most_common(OPENINGS)]


def preference_bias(pairs: Sequence[Row]) -> dict[str, Table]:
    """Lengths of chosen and rejected, how often the longer is chosen, and Cohen's d of each mark of style."""
    if not pairs:
        return {}
    chosen, rejected = (_said(pairs, column) for column in ("chosen", "rejected"))
    longer = [len(one) > len(other) for one, other in zip(chosen, rejected, strict=True)]
    lengths = [
        {"what": f"{name} in words", **_quantiles([len(split_words(text)) for text in texts])}
        for name, texts in (("chosen", chosen), ("rejected", rejected))
    ]
    rewards = [
        {"what": name, **_quantiles([row[name] for row in pairs])}
        for name in ("margin", "chosen_reward", "rejected_reward")
    ]
    style = [{"what": "chosen_longer_share", "value": float(np.mean(longer))}]
    for name, mark in STYLE.items():
        differences = np.array([mark(one) - mark(other) for one, other in zip(chosen, rejected, strict=True)], float)
        style.append({"what": f"cohens_d_{name}", "value": float(standardise(differences).mean())})
    return {"Lengths": lengths, "Rewards": rewards, "Chosen less rejected": style}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    found = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")
    return dict(zip(QUANTILES, map(float, found), strict=True))
