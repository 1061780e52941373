"""How many labels are wrong: by confident learning on frozen embeddings, or by how annotators agree."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.errors import UserError

if TYPE_CHECKING:
    import numpy as np

FOLDS = 5
REPLICATES = 200
LARGEST = 0.49
"""With more wrong labels than this nobody can say which half is right."""
REGULARISATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse L2 strengths tried; the one with the best out-of-fold likelihood of the noisy labels is used."""


@dataclass(frozen=True)
class NoiseEstimate:
    """The share of wrong labels and its 95 % bootstrap interval."""

    rate: float
    low: float
    high: float


def orient_pairs(differences: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn each pair around at random, so that there are two classes to tell apart.

    `differences` (pairs, dimensions) is chosen minus rejected; returned are the oriented differences of the same
    shape and the labels (pairs,): 1 where the first answer is the chosen one.
    """
    import numpy as np

    labels = np.random.default_rng(seed).integers(0, 2, len(differences))
    return differences * (2 * labels - 1)[:, None], labels


def estimate_noise_rate(features: np.ndarray, labels: np.ndarray, groups: list[str], seed: int) -> NoiseEstimate:
    """Estimate the share of wrong labels by confident learning (Northcutt et al. 2021, section 3.1).

    `features` (pairs, dimensions) are oriented embedding differences, `labels` (pairs,) 0 or 1, `groups` the
    prompt of each pair: one prompt never stands on both sides of a fold. Noise that follows the features (a liking
    for length, whole topics turned around) looks like signal and is underestimated; embeddings that do not tell
    good answers from bad ones make the estimate too high. Raises UserError where it cannot be used.
    """
    _check_input(features, labels, groups)
    probabilities = predict_out_of_fold(features, labels, groups)
    rate = _confident_rate(labels, probabilities)
    low, high = _bootstrap_interval(labels, probabilities, groups, seed)
    if not rate < 0.5:
        raise UserError(
            f"the estimated noise rate of the labels is {rate:.2f}, not below 0.5: the labels are turned around "
            "or the model's embeddings say nothing about them; check that `chosen` is the better answer, or set "
            "reward.noise_rate to a number"
        )
    return NoiseEstimate(rate, low, high)


def estimate_from_agreement(places: Sequence[Hashable], ways: Sequence[bool], seed: int) -> NoiseEstimate:
    """Estimate the share of wrong votes by how often two votes on the same two answers agree.

    `places` (votes,) names the two answers whatever their order, `ways` (votes,) which of them was preferred. Two
    independent votes that are wrong with probability e agree with probability (1-e)² + e². Where some comparisons are
    harder than others, e is somewhat below the mean. Raises UserError without two votes on one comparison, or where
    votes agree no more often than coins.
    """
    import numpy as np

    _, place = np.unique([str(name) for name in places], return_inverse=True)
    total = np.bincount(place)
    first = np.bincount(place, np.asarray(ways, dtype=float))
    other = total - first
    agreeing, pairs = first * (first - 1) + other * (other - 1), total * (total - 1.0)
    if not pairs.any():
        raise UserError(
            f"none of the {len(total)} comparisons has two votes, so annotators cannot be compared; "
            "set reward.noise_rate to a number or to estimate"
        )
    agreement = agreeing.sum() / pairs.sum()
    if agreement <= 0.5:
        raise UserError(
            f"annotators agree on {agreement:.2f} of their common comparisons, no more than coins would; "
            "check that the columns chosen and rejected mean the same for all of them"
        )
    generator = np.random.default_rng(seed)
    rates = []
    for _ in range(REPLICATES):
        rows = generator.integers(0, len(total), len(total))
        if pairs[rows].any():
            rates.append(_rate_of_agreement(agreeing[rows].sum() / pairs[rows].sum()))
    low, high = np.quantile(rates, (0.025, 0.975))
    return NoiseEstimate(_rate_of_agreement(agreement), float(low), float(high))


def _rate_of_agreement(agreement: float) -> float:
    """The smaller solution e of (1-e)² + e² = agreement; 0.5 where there is none."""
    return (1 - max(0.0, 2 * float(agreement) - 1) ** 0.5) / 2


def estimate_from_trust(again: np.ndarray, groups: list[str], seed: int) -> NoiseEstimate:
    """Confident learning from how probably each label would be given again by all others, `again` (pairs,).

    `groups` are the prompts over which the interval is drawn again.
    """
    import numpy as np

    labels = np.random.default_rng(seed).integers(0, 2, len(again))
    second = np.where(labels == 1, again, 1 - again)
    probabilities = np.stack([1 - second, second], 1)
    low, high = _bootstrap_interval(labels, probabilities, groups, seed)
    return NoiseEstimate(min(_confident_rate(labels, probabilities), LARGEST), low, high)


def _check_input(features: np.ndarray, labels: np.ndarray, groups: list[str]) -> None:
    import numpy as np

    if not np.isfinite(features).all():
        raise UserError("the embeddings for the noise estimate are not finite; check the model in models/sft")
    if len(set(groups)) < FOLDS or min(np.bincount(labels, minlength=2)) < FOLDS:
        raise UserError(
            f"{len(labels)} labels of {len(set(groups))} prompts are too few to estimate the noise rate "
            f"in {FOLDS} folds; set reward.noise_rate to a number"
        )


def predict_out_of_fold(features: np.ndarray, labels: np.ndarray, groups: list[str]) -> np.ndarray:
    """Class probabilities (pairs, 2), each by a logistic regression that has not seen the pair's prompt."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    candidates = []
    for strength in REGULARISATIONS:
        # Without an intercept: a pair turned around must get the opposite verdict.
        head = LogisticRegression(C=strength, fit_intercept=False, max_iter=500)
        model = make_pipeline(StandardScaler(with_mean=False), head)
        folds = GroupKFold(FOLDS)
        guesses = cross_val_predict(model, features, labels, groups=groups, cv=folds, method="predict_proba")
        candidates.append((log_loss(labels, guesses), guesses))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _confident_rate(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mass off the diagonal of cleanlab's joint distribution of given and true labels."""
    import numpy as np
    from cleanlab.count import estimate_joint

    return float(1 - np.trace(estimate_joint(labels, probabilities)))


def _bootstrap_interval(
    labels: np.ndarray, probabilities: np.ndarray, groups: list[str], seed: int
) -> tuple[float, float]:
    """2.5 and 97.5 % points over resampled prompts; the out-of-fold probabilities stay as they are."""
    import numpy as np

    generator = np.random.default_rng(seed)
    _, owner = np.unique(groups, return_inverse=True)
    order = np.argsort(owner, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(owner))[:-1])
    rates = []
    for _ in range(REPLICATES):
        rows = np.concatenate([members[i] for i in generator.integers(0, len(members), len(members))])
        if len(set(labels[rows])) == 2:
            rates.append(_confident_rate(labels[rows], probabilities[rows]))
    low, high = np.quantile(rates, (0.025, 0.975))
    return float(low), float(high)
