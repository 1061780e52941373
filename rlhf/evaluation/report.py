"""What people look at: the KL–reward picture, a table for `dvc plots`, and one page with the answers side by side."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlhf.curves import rounded_number
from rlhf.evaluation.comparison import Estimate
from rlhf.evaluation.frontier import Frontier, Point
from rlhf.evaluation.yardstick import SFT, Measured, Yardstick
from rlhf.pages import open_templates

Policies = dict[str, Measured]

DPI = 120


@dataclass(frozen=True)
class Trainings:
    """What the stages before left: metrics/validate.json, by name health.json and ledger.json, and examples."""

    validation: Mapping[str, Any]
    health: Mapping[str, Any]
    ledgers: Mapping[str, Any]
    examples: Sequence[Mapping[str, str]]


def write_report(
    folder: Path, yardstick: Yardstick, measured: Policies, frontier: Frontier, trainings: Trainings
) -> list[dict[str, Any]]:
    """Write frontier.png, frontier.csv, policies.csv and report.html into `folder`; return answers as flat rows.

    The page shows the prompts on which policies disagree most; the rows are those of the first prompts, the same ones
    in every run, so that runs can be compared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw_frontier(folder / "frontier.png", frontier)
    frontier.write(folder / "frontier.csv")
    _write_table(folder / "policies.csv", measured)
    shown = yardstick.params.samples_shown
    page = (
        _environment()
        .get_template("report.html")
        .render(
            policies={name: one.metrics for name, one in measured.items()},
            trainings=trainings,
            validated={kind: one for kind, one in trainings.validation.items() if isinstance(one, Mapping)},
            gold=yardstick.gold.name,
            is_binary=all(gold in (0.0, 1.0) for one in measured.values() for gold in one.gold),
            temperature=yardstick.params.temperature,
            kl_budget=yardstick.params.kl_budget,
            picture=base64.b64encode((folder / "frontier.png").read_bytes()).decode("ascii"),
            cards=[_card(index, yardstick, measured) for index in rank_prompts(measured)[:shown]],
        )
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return [row for index in range(min(shown, len(yardstick.rows))) for row in _flat_rows(index, yardstick, measured)]


def _environment() -> Environment:
    environment = open_templates(Path(__file__).parent)
    environment.filters["figure"] = lambda value: "–" if value is None else f"{value:.3f}"
    environment.filters["share"] = lambda value: "–" if value is None else f"{value:.1%}"
    environment.filters["strongest"] = _strongest
    return environment


def _strongest(style: Mapping[str, float | None] | None) -> str:
    """The mark with the greatest effect and its size; a dash where none was measured."""
    known = {name: size for name, size in (style or {}).items() if size is not None}
    name = max(known, key=lambda name: abs(known[name]), default=None)
    return "–" if name is None else f"{name} {known[name]:+.2f}"


# picture ------------------------------------------------------------------------------------------


def draw_frontier(path: Path, frontier: Frontier) -> None:
    """Gold and proxy reward against the distance from the SFT model, with 95 % intervals of the means.

    A thin line follows a policy through its training, the large mark is the policy that was saved. The same figures
    give the same bytes.
    """
    rewards: dict[str, Callable[[Point], Estimate | None]] = {
        "what counts": lambda point: point.gold,
        "what the reward model believes": lambda point: point.proxy,
    }
    panels = {
        title: {name: estimate for name, point in frontier.saved.items() if (estimate := reward(point))}
        for title, reward in rewards.items()
    }
    titles = [title for title, shown in panels.items() if len(shown) == len(frontier.saved)]
    figure = Figure(figsize=(5.4 * len(titles), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for axis, title in zip(axes, titles, strict=True):
        _draw_panel(axis, frontier, rewards[title])
        name = "gold reward" if title == "what counts" else "proxy reward"
        axis.set(xlabel="KL to the SFT model (nats per answer)", ylabel=name, title=title)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3 * len(titles), frameon=False
    )
    # Without the version of matplotlib in it.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _draw_panel(axis: Axes, frontier: Frontier, reward: Callable[[Point], Estimate | None]) -> None:
    reference = frontier.saved[SFT]
    for number, (policy, point) in enumerate(frontier.saved.items()):
        states = [(state.kl, one) for state in frontier.paths.get(policy, []) if (one := reward(state))]
        looks = {"color": f"C{number}", "fmt": ".-", "markersize": 3, "linewidth": 1, "alpha": 0.45, "elinewidth": 0.7}
        if states:
            bars = [_bars(one) for _, one in states]
            yerr = [[bar[side][0] for bar in bars] for side in (0, 1)]
            axis.errorbar([kl for kl, _ in states], [one.mean for _, one in states], yerr=yerr, **looks)
        if one := reward(point):
            mark = "s" if policy == SFT else "o"
            looks = {"color": f"C{number}", "capsize": 3, "elinewidth": 1.2, "markersize": 7, "zorder": 3}
            axis.errorbar(point.kl, one.mean, yerr=_bars(one), fmt=mark, **looks, label=policy)
    line = [(point.kl, one) for point in (reference, *frontier.best_of) if (one := reward(point))]
    if frontier.best_of:
        places, means = [kl for kl, _ in line], [one.mean for _, one in line]
        axis.plot(places, means, color="0.35", linewidth=1.2, linestyle="--", label="SFT, best of n by the proxy")
        band = ([one.low for _, one in line], [one.high for _, one in line])
        axis.fill_between(places, *band, color="0.35", alpha=0.1, linewidth=0)
    if start := reward(reference):
        axis.axhline(start.mean, color="0.6", linewidth=1, linestyle=":", zorder=1)
    axis.margins(x=0.08, y=0.12)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _bars(estimate: Estimate) -> list[list[float]]:
    return [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]


# tables and answers -------------------------------------------------------------------------------


def _write_table(path: Path, measured: Policies) -> None:
    """One row per policy and one column per number in its metrics."""
    columns = [key for key, value in measured[SFT].metrics.items() if not isinstance(value, str)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["policy", *columns])
        for name, one in measured.items():
            writer.writerow([name, *(rounded_number(one.metrics[key]) for key in columns)])


def rank_prompts(measured: Policies) -> list[int]:
    """Places of the prompts: those on which the policies' gold rewards differ most, then those all get wrong."""
    columns = list(zip(*(one.gold for one in measured.values()), strict=True))
    return sorted(
        range(len(columns)), key=lambda index: (min(columns[index]) - max(columns[index]), sum(columns[index]))
    )


def _card(index: int, yardstick: Yardstick, measured: Policies) -> dict[str, Any]:
    row = yardstick.rows[index]
    answers = [{"policy": name, **_answer(index, one)} for name, one in measured.items()]
    best = max(answer["gold"] for answer in answers)
    believed = [answer["proxy"] for answer in answers if answer["proxy"] is not None]
    for answer in answers:
        answer["favourite"] = bool(believed) and answer["proxy"] == max(believed)
    return {
        "prompt": _prompt_text(row["prompt"]),
        "expected": row.get("answer"),
        "disagree": any(answer["gold"] != best for answer in answers),
        "misled": any(answer["favourite"] for answer in answers)
        and not any(answer["favourite"] and answer["gold"] == best for answer in answers),
        "answers": answers,
    }


def _flat_rows(index: int, yardstick: Yardstick, measured: Policies) -> list[dict[str, Any]]:
    prompt = _prompt_text(yardstick.rows[index]["prompt"])
    return [{"prompt": prompt, "policy": name, **_answer(index, one)} for name, one in measured.items()]


def _answer(index: int, one: Measured) -> dict[str, Any]:
    answer = one.answers[index]
    return {
        "answer": answer.text,
        "gold": one.gold[index],
        "proxy": one.proxy[index] if one.proxy else None,
        "tokens": len(answer.token_ids),
        "ended": answer.ended,
    }


def _prompt_text(prompt: str | Sequence[dict[str, str]]) -> str:
    if isinstance(prompt, str):
        return prompt.strip()
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
