"""Tables and figure of benchmarks/reward_noise.py: the cells of each kind of noise, compared with Bradley-Terry."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from over_seeds import holm

UNTRAINED = ("constant", "length only")
HEADS = {"mlp": "bradley_terry", "linear": "bradley_terry, tuned decay"}
"""The row that the others of each head are compared with."""


def choose(cells: list[dict[str, Any]], kind: str) -> dict[str, list[dict[str, float]]]:
    """Of each row one result per cell: without decay, and with the decay that the noisy validation labels prefer."""
    rows = {name: [c["rows"][name] for c in cells] for name in UNTRAINED}
    for cell in cells:
        found: dict[str, dict[str, dict[str, float]]] = {}
        for name, row in cell["rows"].items():
            if name.startswith(kind + " "):
                _, decay, objective = name.split(" ", 2)
                found.setdefault(objective.strip(), {})[decay] = row
        for objective, by_decay in found.items():
            if "0" in by_decay:
                rows.setdefault(objective, []).append(by_decay["0"])
            if len(by_decay) > 1:
                best = max(by_decay.values(), key=lambda row: row["validation"])
                rows.setdefault(f"{objective}, tuned decay", []).append(best)
    return rows


def compare(rows: dict[str, list[dict[str, float]]], reference: str) -> dict[str, str]:
    """Accuracy in percent, its paired difference to the reference with standard error; * is p < .05 (Holm)."""
    accuracy = {name: np.array([100 * result["accuracy"] for result in results]) for name, results in rows.items()}
    others = {name: values for name, values in accuracy.items() if name != reference}
    significance = holm({name: ttest_rel(values, accuracy[reference]).pvalue for name, values in others.items()})
    shown = {reference: f"**{accuracy[reference].mean():.1f}**"}
    for name, values in others.items():
        difference = values - accuracy[reference]
        error = difference.std(ddof=1) / len(difference) ** 0.5
        star = "*" if significance[name] < 0.05 else ""
        shown[name] = f"{values.mean():.1f} ({difference.mean():+.1f} ± {error:.1f}{star})"
    return shown


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """Tables over all kinds of noise: detection, and for either head accuracy and the other figures."""
    print("| AUROC, precision, recall of trust | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
    for name in next(iter(found.values()))[0]["detection"]:
        cells = []
        for results in found.values():
            means = [np.mean([c["detection"][name][key] for c in results]) for key in ("auroc", "precision", "recall")]
            cells.append(" ".join(f"{mean:.3f}" for mean in means))
        print(f"| {name.strip(' ,') or 'no groups'} | " + " | ".join(cells) + " |")
    for kind, reference in HEADS.items():
        rows = {noise: choose(cells, kind) for noise, cells in found.items()}
        if not all(reference in chosen for chosen in rows.values()):
            continue
        compared = {noise: compare(chosen, reference) for noise, chosen in rows.items()}
        heads = [
            f"{noise} ({len(cells)} cells, {np.mean([c['rate'] for c in cells]):.0%})" for noise, cells in found.items()
        ]
        print(f"\n| {kind} head | " + " | ".join(heads) + " |\n|---" + "|---" * len(heads) + "|")
        for name in next(iter(compared.values())):
            print(f"| {name} | " + " | ".join(table[name] for table in compared.values()) + " |")
        print(f"\n| {kind} head: AUROC, MAE, R², ECE | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
        for name in next(iter(compared.values())):
            cells = []
            for table in rows.values():
                means = [np.mean([result[key] for result in table[name]]) for key in ("auroc", "mae", "r2", "ece")]
                cells.append(" ".join(f"{mean:.2f}" for mean in means))
            print(f"| {name} | " + " | ".join(cells) + " |")


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Differences of accuracy to Bradley-Terry: a row of panels per head, in it one per kind of noise that was run."""
    from matplotlib.figure import Figure

    gaps = {kind: {noise: _gaps(cells, kind) for noise, cells in found.items()} for kind in HEADS}
    names = {kind: _union(by_noise.values()) for kind, by_noise in gaps.items()}
    kinds = [kind for kind in HEADS if names[kind]]
    figure = Figure(figsize=(2.1 * len(found) + 2, sum(1 + 0.22 * len(names[kind]) for kind in kinds)))
    figure.set_layout_engine("constrained")
    heights = [len(names[kind]) for kind in kinds]
    grid = figure.subplots(len(kinds), len(found), squeeze=False, height_ratios=heights, sharey="row")
    for kind, panels in zip(kinds, grid, strict=True):
        panels[0].set_yticks(range(len(names[kind])), names[kind][::-1])
        panels[0].set_ylabel(f"{kind} head")
        for panel, (noise, rows) in zip(panels, gaps[kind].items(), strict=True):
            if not rows:
                panel.axis("off")
                continue
            rate = np.mean([cell["rate"] for cell in found[noise]])
            panel.set_title(f"{noise.replace('_', ' ')}, {rate:.0%} wrong", fontsize=9)
            panel.axvline(0, color="black", linewidth=0.8)
            for place, name in enumerate(names[kind][::-1]):
                if name in rows:
                    colour = "#b3261e" if "selective" in name else "#33658a"
                    error = rows[name].std(ddof=1) / len(rows[name]) ** 0.5
                    panel.barh(place, rows[name].mean(), xerr=error, color=colour, error_kw={"linewidth": 1})
    figure.supxlabel("accuracy against Bradley-Terry, points, with the standard error of the paired difference")
    figure.savefig(path, dpi=110)


def _gaps(cells: list[dict[str, Any]], kind: str) -> dict[str, np.ndarray]:
    """(cells,) per row but the constant: points above the head's reference; nothing where that was not run."""
    rows = choose(cells, kind)
    if HEADS[kind] not in rows:
        return {}
    accuracy = {name: np.array([100 * result["accuracy"] for result in results]) for name, results in rows.items()}
    base = accuracy[HEADS[kind]]
    return {name: values - base for name, values in accuracy.items() if name not in ("constant", HEADS[kind])}


def _union(rows: Iterable[dict[str, np.ndarray]]) -> list[str]:
    """The rows of any panel, those without and with trust or topics in the order of the objectives' names."""
    return sorted({name for by_name in rows for name in by_name}, key=lambda name: (name != "length only", name))
