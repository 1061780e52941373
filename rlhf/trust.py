"""How far each preference label can be trusted, by what all other pairs say."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import minimize, minimize_scalar, root_scalar
from scipy.special import expit, logit

from rlhf.errors import UserError
from rlhf.strengths import Design, fit_strengths, leave_each_out, likelihood

logger = logging.getLogger(__name__)

GROUP_FOLDS = 16
"""At most so many folds of whole groups."""
FEWEST = 5
SCALES = (0.05, 0.2, 0.6, 2.0, 6.0)
"""Variances of the margins that are tried."""
ANSWER_SCALES = (0.05, 0.15, 0.5, 1.5)
"""How much of that an answer's own strength has, beyond what its embedding says."""
MOST_DIMENSIONS = 512
MOST_ANSWERS = 2000
PRIOR_PAIRS = 5.0
"""The common rate counts in a group's rate like so many pairs."""
EVIDENCE = 5.0
"""A group has a rate of its own, and sure labels less noise than given, where that is better by so many nats."""
REPETITIONS = 5


@dataclass(frozen=True)
class Trust:
    """What all other labels say of each.

    `right` (pairs,): the probability that a label is right. `rates`: the share of wrong labels of each group.
    `again` (pairs,): the probability that somebody else would label the pair alike. `called_wrong` (pairs,): the share
    of REPETITIONS with a random half of the labels that call it wrong.
    """

    right: np.ndarray
    rates: dict[str, float]
    again: np.ndarray
    called_wrong: np.ndarray

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
    surface: np.ndarray | None = None,
) -> Trust:
    r"""The probability that each label is right, given all labels but its own.

    A logistic regression of the labels on :math:`z_i = h^w_i - h^l_i`, with strengths of their own for answers that
    occur in several pairs, gives margins :math:`m_i` without the label of pair i (rlhf.strengths). With the noise rate
    :math:`\rho_g` of the pair's group, the likelihood of a label is
    :math:`\rho_g + (1 - 2 \rho_g) \sigma(a m_i)`. All widths of the prior whose mean log likelihood is within one
    standard error of the best are averaged.

    Noise is seldom uniform: many wrong labels are close calls, and at large margins labels contradict the model less
    often than in :math:`\rho_g` of all cases. Where a smaller rate explains them EVIDENCE nats better, the scale a lies
    halfway to the one fitted with it. The log odds that a label is right are
    :math:`c - \mathrm{logit} \rho_g + a m_i`, with c such that on average as many labels are wrong as the rates say.

    A group's rate comes first from a model of the *other* groups, as a group that is wrong as a whole would convince a
    model of its own; then all are fitted together, where the labels of a group that is mostly wrong count as turned
    around.

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
    surface : array, shape (pairs, marks), or None
        What the chosen answer's looks have ahead of the rejected one's (rlhf.surface); stands beside the embedding.

    Raises
    ------
    UserError
        If the embeddings are not finite, or the noise rate is out of range.

    References
    ----------
    .. [1] Northcutt et al. (2021). Confident learning. JAIR 70 (out-of-fold probabilities against given labels).
    .. [2] Dawid and Skene (1979). Maximum likelihood estimation of observer error-rates. Applied Statistics 28.
    .. [3] Breiman et al. (1984). Classification and regression trees, section 3.4.3 (the rule of one standard error).
    """
    surface = np.zeros((len(differences), 0)) if surface is None else surface
    _check(differences, noise_rate)
    count = len(differences)
    if count < FEWEST:
        logger.warning("%d labels are too few to judge one by the others; all are trusted", count)
        return Trust(np.full(count, 1 - noise_rate), {}, np.full(count, 1 - noise_rate), np.zeros(count))
    features = _features(differences, surface, seed)
    names, member = np.unique(groups if groups is not None else [""] * count, return_inverse=True)
    rates = np.full(len(names), noise_rate)
    if len(names) > 2:
        rates = _group_rates(_margins_by_other_groups(features, member, noise_rate, seed), member, noise_rate)
    design = Design(features, _incidence(answers))
    kept = _priors(design)
    margins = np.zeros(count)
    for _ in range(2 if len(names) > 1 else 1):
        margins, kept = _average(design, kept, rates[member])
        if len(names) > 1:
            rates = _group_rates(margins, member, noise_rate)
    noise = _fit_noise(margins, rates[member])
    right = expit(_log_odds(noise.scale * margins, rates[member]))
    again = likelihood(noise.label_scale * margins, noise.sure)
    called_wrong = _repeat(design, kept[0], rates[member], seed)
    return Trust(right, dict(zip(map(str, names), rates.tolist(), strict=True)), again, called_wrong)


def rates_by_other_groups(
    differences: np.ndarray, noise_rate: float, seed: int, groups: Sequence[str], surface: np.ndarray
) -> dict[str, float]:
    """The share of wrong labels of each group by models of the *other* groups' labels; of three groups or more.

    Where it is not EVIDENCE nats better than `noise_rate`, and the logarithm of the number of groups as that many are
    tried, it is that. Arguments and errors are those of `trust_labels`.
    """
    _check(differences, noise_rate)
    names, member = np.unique(groups, return_inverse=True)
    margins = _margins_by_other_groups(_features(differences, surface, seed), member, noise_rate, seed)
    rates = _group_rates(margins, member, noise_rate, EVIDENCE + float(np.log(len(names))))
    return dict(zip(map(str, names), rates.tolist(), strict=True))


def _check(differences: np.ndarray, noise_rate: float) -> None:
    if not np.isfinite(differences).all():
        raise UserError("the embeddings are not finite; check the model they come from")
    if not 0 <= noise_rate < 0.5:
        raise UserError(f"the noise rate is {noise_rate}; labels can be judged by each other below 0.5 only")


def _features(differences: np.ndarray, surface: np.ndarray, seed: int) -> np.ndarray:
    """(pairs, at most MOST_DIMENSIONS) what the regression reads."""
    return np.hstack([_reduce(differences, MOST_DIMENSIONS - surface.shape[1], seed), _scale(surface)])


def _scale(differences: np.ndarray) -> np.ndarray:
    """Each dimension to root mean square 1."""
    spread = np.sqrt(np.square(differences, dtype=np.float64).mean(0))
    return differences / np.where(spread > 0, spread, 1.0)


def _reduce(differences: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Scaled, and at most so many dimensions, those of the largest spread."""
    from sklearn.utils.extmath import randomized_svd

    scaled = _scale(differences)
    if scaled.shape[1] <= most:
        return scaled
    left, sizes, _ = randomized_svd(scaled, most, random_state=seed)
    return left * sizes


def _incidence(answers: np.ndarray) -> sparse.csr_array:
    """Sparse (pairs, answers): 1 for the chosen, -1 for the rejected one of the answers in several pairs."""
    _, places, counts = np.unique(answers, return_inverse=True, return_counts=True)
    recurring = np.flatnonzero(counts > 1)
    if len(recurring) > MOST_ANSWERS:
        logger.info("%d answers occur in several pairs; none gets a strength of its own", len(recurring))
        recurring = recurring[:0]
    column = np.full(len(counts), -1)
    column[recurring] = np.arange(len(recurring))
    at = column[places.reshape(-1, 2)]
    rows, sides = np.nonzero(at >= 0)
    return sparse.csr_array((1.0 - 2.0 * sides, (rows, at[rows, sides])), shape=(len(answers), len(recurring)))


def _priors(design: Design) -> list[np.ndarray]:
    """The widths of the prior to try, as precisions, narrow ones first."""
    answer_scales = ANSWER_SCALES if design.incidence.shape[1] else ANSWER_SCALES[:1]
    return [design.precision(scale, answers) for answers in answer_scales for scale in SCALES]


def _average(design: Design, priors: Sequence[np.ndarray], wrong: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """(pairs,) margins without the pair's own label, averaged over priors nearly as good as the best; and those."""
    everything, weights = np.ones(len(wrong)), None
    tried = []
    for prior in priors:
        weights = fit_strengths(design, prior, wrong, everything, weights)
        margins = leave_each_out(design, prior, wrong, everything, weights)
        tried.append(_calibrate(margins, wrong) * margins)
    return _blend(tried, priors, wrong)


def _blend(
    tried: Sequence[np.ndarray], priors: Sequence[np.ndarray], wrong: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The mean of the margins within one standard error of the most likely ones, and their priors, the best first."""
    logs = np.log([likelihood(margins, wrong) for margins in tried])
    order = np.argsort(-logs.mean(1), kind="stable")
    behind = logs[order[0]] - logs[order]
    near = order[behind.mean(1) <= behind.std(1) / len(wrong) ** 0.5]
    return np.mean([tried[place] for place in near], axis=0), [priors[place] for place in near]


def _calibrate(margins: np.ndarray, wrong: np.ndarray) -> float:
    """The most likely scale."""

    def loss(log_scale: float) -> float:
        return -float(np.log(likelihood(np.exp(log_scale) * margins, wrong)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-4.0, 6.0), method="bounded").x))


def _margins_by_other_groups(features: np.ndarray, member: np.ndarray, noise_rate: float, seed: int) -> np.ndarray:
    """(pairs,) margins by models that have not seen the pair's group."""
    design = Design(features, sparse.csr_array((len(features), 0)))
    wrong = np.full(len(features), noise_rate)
    folds = (np.random.default_rng(seed).permutation(member.max() + 1) % GROUP_FOLDS)[member]
    priors = [design.precision(scale, 1.0) for scale in SCALES[:3]]
    tried = []
    for prior in priors:
        weights = fit_strengths(design, prior, wrong, np.ones(len(wrong)))
        margins = np.empty(len(wrong))
        for fold in np.unique(folds):
            own = folds == fold
            margins[own] = design.margins(fit_strengths(design, prior, wrong, 1.0 - own, weights))[own]
        tried.append(_calibrate(margins, wrong) * margins)
    return _blend(tried, priors, wrong)[0]


def _group_rates(margins: np.ndarray, member: np.ndarray, noise_rate: float, evidence: float = EVIDENCE) -> np.ndarray:
    """(groups,) shares of wrong labels by expectation maximisation; the common rate without `evidence` against it."""
    count = np.bincount(member)
    rates = np.full(len(count), noise_rate)
    for _ in range(30):
        rate = rates[member]
        wrong = rate * expit(-margins) / likelihood(margins, rate)
        rates = (np.bincount(member, wrong) + PRIOR_PAIRS * noise_rate) / (count + PRIOR_PAIRS)
    common = np.log(likelihood(margins, np.full(len(margins), noise_rate)))
    gain = np.bincount(member, np.log(likelihood(margins, rates[member])) - common)
    return np.where(gain > evidence, rates, noise_rate)


@dataclass(frozen=True)
class Noise:
    """`sure` (pairs,): how often labels are wrong at large margins; scales of the margins for truth and for labels."""

    scale: float
    label_scale: float
    sure: np.ndarray


def _fit_noise(margins: np.ndarray, wrong: np.ndarray) -> Noise:
    """Uniform noise of the rates given, unless less noise at large margins explains the labels better by EVIDENCE.

    Then labels cannot say how much of what remains is noise in close calls and how much is truth that the margins do
    not see. The scale for the truth is the geometric mean of what either would make it.
    """
    chances = logit(wrong.clip(1e-6, 1 - 1e-6))

    def loss(point: np.ndarray) -> float:
        return -float(np.log(likelihood(np.exp(point[0]) * margins, expit(chances + point[1]))).sum())

    given = np.log(_calibrate(margins, wrong))
    start = np.array([[given, 0.0], [given - 0.5, 0.0], [given, -1.0]])
    found = minimize(loss, start[0], method="Nelder-Mead", options={"initial_simplex": start})
    if loss(start[0]) - found.fun <= EVIDENCE:
        return Noise(float(np.exp(given)), float(np.exp(given)), wrong)
    scale = float(np.exp((given + found.x[0]) / 2))
    return Noise(scale, float(np.exp(found.x[0])), expit(chances + found.x[1]))


def _log_odds(margins: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """(pairs,) log odds that a label is right, with as many wrong ones as the rates say."""
    plain = margins - logit(wrong.clip(1e-12, 1 - 1e-12))
    return plain + _offset(plain, float(wrong.mean()))


def _offset(log_odds: np.ndarray, rate: float) -> float:
    """What to add to the log odds of being right, so that the probability to be wrong has the mean `rate`."""
    if rate <= 0:
        return np.inf
    far = float(np.abs(log_odds).max()) + 60
    return root_scalar(lambda shift: expit(-log_odds - shift).mean() - rate, bracket=(-far, far)).root


def _repeat(design: Design, prior: np.ndarray, wrong: np.ndarray, seed: int) -> np.ndarray:
    """(pairs,) how often a random half of the labels calls a label wrong; its own never counts."""
    votes = np.zeros(len(wrong))
    generator = np.random.default_rng(seed)
    weights = None
    for _ in range(REPETITIONS):
        half = (generator.permutation(len(wrong)) % 2).astype(float)
        weights = fit_strengths(design, prior, wrong, half, weights)
        margins = leave_each_out(design, prior, wrong, half, weights)
        votes += _log_odds(_fit_noise(margins, wrong).scale * margins, wrong) < 0
    return votes / REPETITIONS
