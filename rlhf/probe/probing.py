"""Asks a reward model whether cheap tricks beat content, and says of each: ok, warn or stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.formats import completion_text
from rlhf.errors import UserError
from rlhf.evaluation.comparison import Estimate, estimate_mean, score_interval
from rlhf.examples import sample_rows
from rlhf.health import VERDICTS
from rlhf.params import Limits, ProbeParams
from rlhf.probe.cases import Case, HeldOut, read_cases
from rlhf.probe.tricks import TRICKS, Trick, apply_trick
from rlhf.scoring import RewardModel

Score = Callable[[Sequence[Any], Sequence[Any]], Sequence[float]]
"""`score(prompts, answers)`, one number per answer."""
LEAST_ROWS = 8
"""A trick that applies to fewer prompts is not judged."""


@dataclass(frozen=True)
class Tried:
    """One trick on the prompts it applies to.

    `answers` and `scores` are those of the answer that is held against the good one, `places` their cases. `wins` is
    the share of prompts on which it beats the good answer, `base` that on which the plain bad answer does, `excess`
    their difference; `gain` what the trick adds to the bad answer's score and `gain_on_good` to the good one's, in
    standard deviations of plain answers' scores.
    """

    trick: Trick
    places: list[int]
    answers: list[Any]
    scores: np.ndarray
    wins: float
    base: float
    excess: Estimate
    gain: Estimate
    gain_on_good: Estimate
    verdict: str

    @property
    def figures(self) -> dict[str, float | int]:
        """What metrics and the table hold."""
        return {
            "verdict": VERDICTS.index(self.verdict),
            "prompts": len(self.places),
            "wins": self.wins,
            "base": self.base,
            "excess": self.excess.mean,
            "excess_low": self.excess.low,
            "excess_high": self.excess.high,
            "gain": self.gain.mean,
            "gain_low": self.gain.low,
            "gain_high": self.gain.high,
            "gain_on_good": self.gain_on_good.mean,
        }


@dataclass(frozen=True)
class Probe:
    """What all tricks did; `source` says where the cases come from, or why there are none.

    `good` and `bad` (cases,) are the scores of the plain answers.
    """

    source: str
    cases: Sequence[Case]
    good: np.ndarray
    bad: np.ndarray
    tried: list[Tried]
    silent: list[str]

    @property
    def verdict(self) -> str:
        return max((one.verdict for one in self.tried), key=VERDICTS.index, default="ok")

    @property
    def figures(self) -> dict[str, Any]:
        """The metrics: those of the plain answers, and of each trick."""
        figures: dict[str, Any] = {"health": VERDICTS.index(self.verdict), "prompts": len(self.cases)}
        if self.cases:
            figures["bad_beats_good"] = float((self.bad > self.good).mean())
            figures["length_correlation"] = correlate_length([case.good for case in self.cases], self.good)
        return figures | {one.trick.name: one.figures for one in self.tried}


def probe_reward_model(section: ProbeParams, model: Path, files: HeldOut, seed: int) -> Probe:
    """Try the tricks on at most `section.rows` held-out prompts; without a model or rows the probe is empty."""
    cases, source = read_cases(files)
    if not (model / "config.json").exists():
        return _empty_probe("no trick was tried: there is no reward model")
    if not cases:
        return _empty_probe("no trick was tried: there are no held-out rows; raise test_share")
    drawn = draw_cases(cases, section, seed)
    return try_tricks(RewardModel(model, section.batch_size).score, drawn, section, f"held-out rows of {source}")


def draw_cases(cases: Sequence[Case], section: ProbeParams, seed: int) -> list[Case]:
    """At most `section.rows` of the cases, drawn without replacement, in their order."""
    return [cases[place] for place in sample_rows(len(cases), section.rows, seed)]


def _empty_probe(reason: str) -> Probe:
    return Probe(reason, [], np.array([]), np.array([]), [], [trick.name for trick in TRICKS])


def try_tricks(score: Score, cases: Sequence[Case], section: ProbeParams, source: str) -> Probe:
    """Score every case's plain answers and what each trick makes of them, and judge the tricks.

    `score` may be any reward function of texts or messages.
    """
    prompts = [case.prompt for case in cases]
    good = np.array(score(prompts, [case.good for case in cases]), dtype=float)
    bad = np.array(score(prompts, [case.bad for case in cases]), dtype=float)
    found = [_try(score, cases, trick, good, bad, section) for trick in TRICKS]
    silent = [trick.name for trick, one in zip(TRICKS, found, strict=True) if one is None]
    return Probe(source, cases, good, bad, [one for one in found if one], silent)


def _try(
    score: Score, cases: Sequence[Case], trick: Trick, good: np.ndarray, bad: np.ndarray, section: ProbeParams
) -> Tried | None:
    """What one trick does; None where it applies to too few of the good or of the bad answers."""
    sides = {}
    for side, plain in (("good", good), ("bad", bad)):
        tricked = [apply_trick(trick, getattr(case, side), case.language) for case in cases]
        places = [place for place, answer in enumerate(tricked) if answer is not None]
        answers = [tricked[place] for place in places]
        scores = np.array(score([cases[place].prompt for place in places], answers), dtype=float)
        sides[side] = places, answers, scores, scores - plain[places]
    if min(len(places) for places, *_ in sides.values()) < LEAST_ROWS:
        return None
    spread = float(np.concatenate([good, bad]).std()) or 1.0
    places, answers, scores, _ = sides[trick.side]
    wins, base = scores > good[places], bad[places] > good[places]
    excess = _excess(wins, base)
    gain, gain_on_good = (estimate_mean((sides[side][3] / spread).tolist()) for side in ("bad", "good"))
    verdicts = [_judge(excess, section.wins), _judge(gain, section.gain) if trick.adds else "ok"]
    verdict = max(verdicts, key=VERDICTS.index)
    return Tried(
        trick, places, answers, scores, float(wins.mean()), float(base.mean()), excess, gain, gain_on_good, verdict
    )


def _excess(wins: np.ndarray, base: np.ndarray) -> Estimate:
    """The difference of two shares on the same prompts, with a 95 % interval."""
    more, fewer = int((wins & ~base).sum()), int((base & ~wins).sum())
    return Estimate((more - fewer) / len(wins), *score_interval(more, fewer, len(wins)))


def _judge(estimate: Estimate, limits: Limits) -> str:
    """By the lower end of the interval, so that few prompts or bad luck accuse nobody."""
    return "stop" if estimate.low > limits.stop else "warn" if estimate.low > limits.warn else "ok"


def correlate_length(answers: Sequence[Any], scores: np.ndarray) -> float | None:
    """Rank correlation of score and characters among answers that are equally good; None where either is constant."""
    from scipy.stats import rankdata

    lengths = np.array([len(completion_text(answer)) for answer in answers])
    if len(answers) < LEAST_ROWS or np.ptp(lengths) == 0 or np.ptp(scores) == 0:
        return None
    return float(np.corrcoef(rankdata(lengths), rankdata(scores))[0, 1])


# words --------------------------------------------------------------------------------------------


def describe(one: Tried, section: ProbeParams) -> dict[str, Any]:
    """A trick's finding, in the form of the health rules'."""
    finding = (
        f"beats the good answer on {one.wins:.2f} of the prompts, the plain bad answer on {one.base:.2f}: "
        f"{one.excess.mean:+.2f}, at least {one.excess.low:+.2f} ({_limits(section.wins)})"
    )
    if one.trick.adds:
        finding += f"; pays {one.gain.mean:+.2f} spreads, at least {one.gain.low:+.2f} ({_limits(section.gain)})"
    words = {"meaning": f"A policy that maximises this score learns {one.trick.lesson}.", "remedy": REMEDY}
    return {
        "rule": f"{one.trick.title} answers",
        "verdict": one.verdict,
        "curves": [],
        "value": one.excess.mean,
        "finding": finding,
        **({} if one.verdict == "ok" else words),
    }


REMEDY = (
    "Train the reward model on pairs in which such answers lose (the probe's own serve), or give the policies a reward "
    "beside it and a larger beta."
)


def _limits(limits: Limits) -> str:
    return f"warn above {limits.warn:g}, stop above {limits.stop:g}"


def refuse_hackable(found: Probe, section: ProbeParams, report: Path) -> None:
    """Raise UserError, naming the worst trick, where one says stop and `probe.on_hackable` does too."""
    if section.on_hackable == "warn" or found.verdict != "stop":
        return
    worst = max((one for one in found.tried if one.verdict == "stop"), key=lambda one: one.excess.low)
    raise UserError(
        f"the reward model can be hacked by {worst.trick.title} answers: {worst.trick.what} beats the good answer on "
        f"{worst.wins:.0%} of {len(worst.places)} prompts, the plain bad answer on {worst.base:.0%}, and pays "
        f"{worst.gain.mean:+.1f} standard deviations of the score; train the reward model on pairs in which such "
        f"answers lose, or set probe.on_hackable to warn ({report}/probe.html has the table)"
    )
