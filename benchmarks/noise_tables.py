"""Tables and figure of benchmarks/reward_noise.py: the cells of each kind of noise, compared with Bradley-Terry."""

from __future__ import annotations

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
    """Differences of accuracy to Bradley-Terry, one panel per kind of noise, for the head that memorises."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(found) + 1.5, 5.5), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (noise, cells) in zip(panels, found.items(), strict=True):
        rows = choose(cells, "mlp")
        names = [name for name in rows if name not in ("constant", "bradley_terry")][::-1]
        base = np.array([100 * result["accuracy"] for result in rows["bradley_terry"]])
        gaps = [np.array([100 * result["accuracy"] for result in rows[name]]) - base for name in names]
        colours = ["#b3261e" if "selective" in name else "#33658a" for name in names]
        panel.barh(names, [gap.mean() for gap in gaps], color=colours)
        errors = [gap.std(ddof=1) / len(gap) ** 0.5 for gap in gaps]
        panel.errorbar([gap.mean() for gap in gaps], names, xerr=errors, fmt="none", color="black", linewidth=1)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(f"{noise}, {np.mean([cell['rate'] for cell in cells]):.0%} wrong")
        panel.set_xlabel("accuracy against Bradley-Terry, points")
    figure.savefig(path, dpi=110)
