"""What people look at: the KL–reward picture and one page with every policy's answers side by side."""

from __future__ import annotations

import base64
import csv
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from rlhf.curves import rounded_number
from rlhf.data.formats import completion_text, is_conversational
from rlhf.evaluation.yardstick import SFT, Measured, Yardstick

COLUMNS = {
    "gold_reward": "gold reward",
    "gold_reward_greedy": "gold, greedy",
    "proxy_reward": "proxy reward",
    "win_rate": "win rate",
    "win_rate_low": "95 % from",
    "win_rate_high": "to",
    "kl_to_sft": "KL to SFT (nats)",
    "mean_tokens": "tokens",
    "stop_rate": "stop rate",
}


def write_report(folder: Path, yardstick: Yardstick, measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Write frontier.png, policies.csv and report.html into `folder`; returns the shown answers as flat rows."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_frontier(folder / "frontier.png", measured)
    _write_table(folder / "policies.csv", measured)
    prompts = _interesting_prompts(measured)[: yardstick.params.samples_shown]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        columns=COLUMNS,
        policies={name: rounded_number(one.metrics) for name, one in measured.items()},
        picture=base64.b64encode((folder / "frontier.png").read_bytes()).decode("ascii"),
        prompts=[_card(index, yardstick, measured) for index in prompts],
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return [row for index in prompts for row in _flat_rows(index, yardstick, measured)]


def draw_frontier(path: Path, measured: dict[str, Measured]) -> None:
    """Gold and proxy reward against the distance from the SFT model; bars are 95 % intervals of the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("gold_reward", "gold reward (never trained on)", lambda one: one.gold)]
    if all(one.proxy for one in measured.values()):
        panels.append(("proxy_reward", "proxy reward (the reward model)", lambda one: one.proxy))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (key, title, rewards) in zip(axes[0], panels, strict=True):
        for index, (name, one) in enumerate(measured.items()):
            values = rewards(one)
            mean = sum(values) / len(values)
            error = 1.96 * (sum((value - mean) ** 2 for value in values) / len(values) ** 2) ** 0.5
            x, y = one.metrics["kl_to_sft"], one.metrics[key]
            axis.errorbar(x, y, yerr=error, fmt="s" if name == SFT else "o", color=f"C{index}", capsize=4, markersize=8)
            axis.annotate(name, (x, y), textcoords="offset points", xytext=(9, 5))
        axis.set(xlabel="KL to the SFT model (nats per answer)", ylabel=key.replace("_", " "), title=title)
        axis.margins(x=0.15, y=0.15)
        axis.grid(alpha=0.3)
    # Without the version of matplotlib in it, the same figures give the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _write_table(path: Path, measured: dict[str, Measured]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["policy", *COLUMNS])
        for name, one in measured.items():
            writer.writerow([name, *(rounded_number(one.metrics[key]) for key in COLUMNS)])


def _interesting_prompts(measured: dict[str, Measured]) -> list[int]:
    """Prompts where policies disagree come first, then those that all get wrong."""
    golds = [one.gold for one in measured.values()]

    def rank(index: int) -> tuple[float, float, int]:
        values = [gold[index] for gold in golds]
        return (min(values) - max(values), sum(values), index)

    return sorted(range(len(golds[0])), key=rank)


def _card(index: int, yardstick: Yardstick, measured: dict[str, Measured]) -> dict[str, Any]:
    row = yardstick.rows[index]
    answers = [{"policy": name, **_answer(index, one)} for name, one in measured.items()]
    best = max(answer["gold"] for answer in answers)
    return {"prompt": _prompt_text(row["prompt"]), "expected": row.get("answer"), "best": best, "answers": answers}


def _flat_rows(index: int, yardstick: Yardstick, measured: dict[str, Measured]) -> list[dict[str, Any]]:
    prompt = _prompt_text(yardstick.rows[index]["prompt"])
    return [{"prompt": prompt, "policy": name, **_answer(index, one)} for name, one in measured.items()]


def _answer(index: int, one: Measured) -> dict[str, Any]:
    answer = one.answers[index]
    return {
        "answer": answer.text,
        "gold": rounded_number(one.gold[index]),
        "proxy": rounded_number(one.proxy[index]) if one.proxy else None,
        "tokens": len(answer.token_ids),
        "ended": answer.ended,
    }


def _prompt_text(prompt: Any) -> str:
    return completion_text(prompt) if is_conversational(prompt) else prompt.strip()
