"""How far each preference label can be trusted, by what all other pairs say: ridge regression out of fold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from rlhf.errors import UserError

logger = logging.getLogger(__name__)

FOLDS = 5
GROUP_FOLDS = 16
"""At most so many folds of whole groups."""
RIDGE = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Penalties tried, per pair."""
ITEM_SCALES = (0.0, 10.0)
"""How much an answer's own strength may deviate from what its embedding says; 0: not at all."""
MOST_DIMENSIONS = 512
MOST_ITEMS = 2000
PRIOR_PAIRS = 5.0
"""The common rate counts in a group's rate like so many pairs."""
EVIDENCE = 5.0
"""A group has a rate of its own where that is better by so many nats."""
ROUNDS = 2


@dataclass(frozen=True)
class Trust:
    """`right` (pairs,): the probability that a label is right. `rates`: the share of wrong labels of each group."""

    right: np.ndarray
    rates: dict[str, float]

    @property
    def doubt(self) -> np.ndarray:
        """(pairs,) log odds that the label is wrong, 0 where it is more likely right."""
        right = self.right.clip(1e-3, 1 - 1e-3)
        return np.maximum(0.0, np.log1p(-right) - np.log(right))


def trust_labels(
    differences: np.ndarray,
    answers: np.ndarray,
    noise_rate: float,
    seed: int,
    groups: Sequence[str] | None = None,
) -> Trust:
    r"""The probability that each label is right, given all labels but its own.

    A ridge regression of the constant 1 on :math:`z_i = h^w_i - h^l_i`, and on indicators of the two answers where
    answers occur in several pairs, gives margins :math:`m_i` from the folds without pair i. With the noise rate
    :math:`\rho_g` of the pair's group, the likelihood of a label is
    :math:`(1 - \rho_g) q_i + \rho_g (1 - q_i)`, :math:`q_i = \sigma(a m_i)`; it chooses penalty, scale a and whether
    answers have strengths of their own. The label is right with probability
    :math:`(1 - \rho_g) q_i / ((1 - \rho_g) q_i + \rho_g (1 - q_i))`.

    A group's rate comes first from a model of the *other* groups, as a group that is wrong as a whole would
    convince a model of its own; then the regression is repeated with labels counted by :math:`1 - 2 \rho_g`, which
    turns the labels of a group that is mostly wrong around.

    Fewer than 5 pairs cannot judge each other; they are all trusted, with a warning.

    Parameters
    ----------
    differences : array, shape (pairs, dimensions)
        Embedding of the chosen minus embedding of the rejected answer.
    answers : array of int, shape (pairs, 2)
        Which answer is the chosen and which the rejected one; equal numbers are one answer.
    noise_rate : float in [0, 0.5)
        The share of wrong labels, where a group has no rate of its own.
    groups : one name per pair, or None
        Topic, source or annotator.

    Raises
    ------
    UserError
        If the embeddings are not finite, or the noise rate is out of range.

    References
    ----------
    .. [1] Northcutt et al. (2021). Confident learning. JAIR 70 (out-of-fold probabilities against given labels).
    .. [2] Dawid and Skene (1979). Maximum likelihood estimation of observer error-rates. Applied Statistics 28.
    """
    _check(differences, noise_rate)
    if len(differences) < FOLDS:
        logger.warning("%d preference pairs are too few to judge one by the others; all are trusted", len(differences))
        return Trust(np.full(len(differences), 1 - noise_rate), {})
    features = _reduce(differences, seed)
    indicators = _indicators(answers)
    folds = np.random.default_rng(seed).permutation(len(features)) % FOLDS
    names, member = np.unique(groups if groups is not None else [""] * len(features), return_inverse=True)
    rates = np.full(len(names), noise_rate)
    if len(names) > 2:
        others = np.random.default_rng(seed).permutation(len(names))[member] % GROUP_FOLDS
        better = _predict([features], others, rates[member])
        rates = _group_rates(better, member, noise_rate)
    better = np.full(len(features), 0.5)
    candidates = [features] if indicators is None else [np.hstack([features, s * indicators]) for s in ITEM_SCALES]
    for _ in range(ROUNDS if len(names) > 1 else 1):
        better = _predict(candidates, folds, rates[member])
        if len(names) > 1:
            rates = _group_rates(better, member, noise_rate)
    wrong = rates[member]
    right = (1 - wrong) * better / _likelihood(better, wrong)
    return Trust(right, dict(zip(map(str, names), rates.tolist(), strict=True)))


def _check(differences: np.ndarray, noise_rate: float) -> None:
    if not np.isfinite(differences).all():
        raise UserError("the embeddings of the preference pairs are not finite; check the model they come from")
    if not 0 <= noise_rate < 0.5:
        raise UserError(f"the noise rate is {noise_rate}; labels can be judged by each other below 0.5 only")


def _reduce(differences: np.ndarray, seed: int) -> np.ndarray:
    """Each dimension to root mean square 1; at most MOST_DIMENSIONS, those of the largest spread."""
    from sklearn.utils.extmath import randomized_svd

    spread = np.sqrt(np.square(differences, dtype=np.float64).mean(0))
    scaled = differences / np.where(spread > 0, spread, 1.0)
    if scaled.shape[1] <= MOST_DIMENSIONS:
        return scaled
    left, sizes, _ = randomized_svd(scaled, MOST_DIMENSIONS, random_state=seed)
    return left * sizes


def _indicators(answers: np.ndarray) -> np.ndarray | None:
    """(pairs, answers): 1 for the chosen, -1 for the rejected one of answers in several pairs; None if all differ."""
    _, places, counts = np.unique(answers, return_inverse=True, return_counts=True)
    recurring = np.flatnonzero(counts > 1)
    if not len(recurring):
        return None
    if len(recurring) > MOST_ITEMS:
        logger.info("%d answers occur in several pairs; none gets a strength of its own", len(recurring))
        return None
    column = np.full(len(counts), -1)
    column[recurring] = np.arange(len(recurring))
    matrix = np.zeros((len(answers), len(recurring)))
    for side, sign in ((0, 1.0), (1, -1.0)):
        at = column[places.reshape(-1, 2)[:, side]]
        np.add.at(matrix, (np.flatnonzero(at >= 0), at[at >= 0]), sign)
    return matrix


def _predict(candidates: Sequence[np.ndarray], folds: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """(pairs,) the probability that the chosen answer is better, of the most likely candidate, penalty and scale."""
    tried = [
        _calibrate(margins, wrong)
        for features in candidates
        for margins in _margins_out_of_fold(features, folds, wrong)
    ]
    return max(tried, key=lambda one: one[0])[1]


def _margins_out_of_fold(features: np.ndarray, folds: np.ndarray, wrong: np.ndarray) -> list[np.ndarray]:
    """For each penalty, (pairs,) margins by a ridge regression that has not seen the pair's fold."""
    counted = features * (1 - 2 * wrong)[:, None]
    weighted = features * np.abs(1 - 2 * wrong)[:, None]
    members = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    grams = [features[rows].T @ weighted[rows] for rows in members]
    targets = [counted[rows].sum(0) for rows in members]
    all_grams, all_targets = sum(grams), sum(targets)
    margins = [np.empty(len(features)) for _ in RIDGE]
    for rows, gram, target in zip(members, grams, targets, strict=True):
        values, vectors = np.linalg.eigh(all_grams - gram)
        seen = features[rows] @ vectors
        along = vectors.T @ (all_targets - target)
        for penalty, out in zip(RIDGE, margins, strict=True):
            out[rows] = seen @ (along / (values.clip(0) + penalty * len(features)))
    return margins


def _calibrate(margins: np.ndarray, wrong: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean log likelihood and (pairs,) probabilities sigmoid(a m) at the most likely scale a."""

    def loss(log_scale: float) -> float:
        return -float(np.log(_likelihood(expit(np.exp(log_scale) * margins), wrong)).mean())

    best = minimize_scalar(loss, bounds=(-4.0, 6.0), method="bounded")
    return -float(best.fun), expit(np.exp(best.x) * margins)


def _likelihood(better: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    return np.maximum((1 - wrong) * better + wrong * (1 - better), 1e-12)


def _group_rates(better: np.ndarray, member: np.ndarray, noise_rate: float) -> np.ndarray:
    """(groups,) shares of wrong labels by expectation maximisation; the common rate where nothing speaks against it."""
    count = np.bincount(member)
    rates = np.full(len(count), noise_rate)
    for _ in range(30):
        rate = rates[member]
        wrong = rate * (1 - better) / _likelihood(better, rate)
        rates = (np.bincount(member, wrong) + PRIOR_PAIRS * noise_rate) / (count + PRIOR_PAIRS)
    common = np.log(_likelihood(better, np.full(len(better), noise_rate)))
    gain = np.bincount(member, np.log(_likelihood(better, rates[member])) - common)
    return np.where(gain > EVIDENCE, rates, noise_rate)
