"""What is known of the training labels before training: how many are wrong, and which ones probably."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from rlhf.data.formats import completion_text, training_rows
from rlhf.embeddings import ANSWERS
from rlhf.errors import UserError
from rlhf.examples import Examples, sample_rows
from rlhf.neighbours import Contradictions, find_contradictions
from rlhf.noise import NoiseEstimate, estimate_from_agreement, estimate_noise_rate, orient_pairs
from rlhf.pairwise import Verdict
from rlhf.params import RewardParams
from rlhf.ratings import with_constant
from rlhf.reward_rows import Source, read_column
from rlhf.surface import read_surface
from rlhf.trust import Trust, trust_labels

logger = logging.getLogger(__name__)

JUDGED = ("selective", "cleanlab")
"""Objectives that are told beforehand what the other labels say of each."""
ESTIMATION_ROWS = 1000
"""At most so many rows are used for the noise estimate (standard error below 0.02)."""


@dataclass(frozen=True)
class Noise:
    """What is known of the training labels before training; `trust` only where the objective asks for it."""

    estimate: NoiseEstimate | None
    rate: float
    groups: list[str] | None
    trust: Trust | None
    contradictions: Contradictions | None = None

    def figures(self) -> dict[str, float | None]:
        """The rate that was used, and the estimate beside it."""
        estimate = self.estimate
        return {
            "noise_rate_estimated": estimate.rate if estimate else None,
            "noise_rate_low": estimate.low if estimate else None,
            "noise_rate_high": estimate.high if estimate else None,
            "noise_rate_used": self.rate,
        }

    def verdict(self) -> Verdict | None:
        """What the training is told: doubts, and that all but the worst `rate` of the labels are believed."""
        if self.trust is None:
            return None
        believed = np.ones(len(self.trust.right), dtype=bool)
        believed[np.argsort(self.trust.right, kind="stable")[: round(self.rate * len(believed))]] = False
        return Verdict(self.trust.doubt, believed)


def study_labels(source: Source, train: Examples, seed: int) -> Noise:
    """Estimate the noise and, for objectives that ask for it, judge each label, by embeddings and looks of answers."""
    section = source.section
    groups = None
    if section.group is not None:
        groups = list(map(str, read_column("group", section.group, source.files.train, train)))
    is_judged = section.objective in JUDGED
    examples = train if is_judged else train.sample(ESTIMATION_ROWS, seed)
    points, surface = examples.points(source.vectors), examples.points(_read_marks(source, examples, seed))
    if examples.labels is not None:
        points = with_constant(points)
    if section.noise_rate == "agreement":
        estimate = _compare_votes(train, seed)
    else:
        estimate = _estimate_noise(section, np.hstack([points, surface]), examples, seed)
    rate = estimate.rate if isinstance(section.noise_rate, str) and estimate else float(section.noise_rate)
    if not is_judged:
        return Noise(estimate, rate, groups, None)
    # A pair is judged as it is, a rating like a pair that stands the right way round where it is good.
    signs = 1 if examples.labels is None else examples.labels[:, None]
    answers = examples.places if examples.labels is None else np.arange(2 * len(examples)).reshape(-1, 2)
    trust = trust_labels(signs * points, answers, rate, seed, groups, signs * surface)
    return Noise(estimate, rate, groups, trust, find_contradictions(signs * points, seed))


def _read_marks(source: Source, examples: Examples, seed: int) -> np.ndarray:
    """(answers, marks) beside the embeddings: what is seen of the answers of these rows, zeros for all others."""
    rows = {row["id"]: row for row in training_rows(source.files.train)}
    texts = {
        place: completion_text(rows[name][column])
        for name, places in zip(examples.ids, examples.places.tolist(), strict=True)
        for column, place in zip(ANSWERS[source.kind], places, strict=True)
    }
    found = read_surface(list(texts.values()), seed)
    marks = np.zeros((len(source.vectors), found.shape[1]), dtype=np.float32)
    marks[list(texts)] = found
    return marks


def _estimate_noise(section: RewardParams, points: np.ndarray, examples: Examples, seed: int) -> NoiseEstimate | None:
    """The estimate; None where it fails but is not needed."""
    rows = sample_rows(len(examples), ESTIMATION_ROWS, seed)
    prompts = [examples.prompts[row] for row in rows]
    labels = examples.labels
    classes = orient_pairs(points[rows], seed) if labels is None else (points[rows], (labels[rows] > 0).astype(int))
    try:
        return estimate_noise_rate(*classes, prompts, seed)
    except UserError as error:
        if section.noise_rate == "estimate":
            raise
        logger.warning("no estimate of the noise rate: %s", error)
        return None


def _compare_votes(examples: Examples, seed: int) -> NoiseEstimate:
    """By votes on the same two answers, or ratings of the same one."""
    places, labels = examples.places, examples.labels
    ways = places[:, 0] < places[:, 1] if labels is None else labels > 0
    return estimate_from_agreement([tuple(sorted(row)) for row in places.tolist()], ways.tolist(), seed)
