"""Bradley-Terry with labels that may be wrong: weights of an embedding, strengths of answers, each label left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit

ITERATIONS = 8
SHARPEST = 0.99
"""A label never decides more than this share of its own margin, so that leaving it out stays finite."""


@dataclass(frozen=True)
class Design:
    """What tells pairs apart.

    `features` (pairs, dimensions) and sparse `incidence` (pairs, answers): 1 for the chosen, -1 for the rejected one.
    """

    features: np.ndarray
    incidence: Any

    def precision(self, scale: float, answers: float) -> np.ndarray:
        """Of the prior of all weights: margins of variance about `scale`, and `answers` times that for an answer."""
        dimensions, count = self.features.shape[1], self.incidence.shape[1]
        return np.r_[np.full(dimensions, dimensions / scale), np.full(count, 1 / (scale * answers))]

    def margins(self, weights: np.ndarray) -> np.ndarray:
        dimensions = self.features.shape[1]
        return self.features @ weights[:dimensions] + self.incidence @ weights[dimensions:]

    def transposed(self, values: np.ndarray) -> np.ndarray:
        return np.r_[self.features.T @ values, self.incidence.T @ values]

    def gram(self, values: np.ndarray) -> np.ndarray:
        """The sum of outer products of the pairs' rows, each times its value."""
        rooted = self.features * np.sqrt(values)[:, None]
        across = self.incidence.T @ (self.features * values[:, None])
        answers = (self.incidence.T @ (self.incidence * values[:, None])).toarray()
        return np.block([[rooted.T @ rooted, across.T], [across, answers]])

    def variances(self, covariance: np.ndarray) -> np.ndarray:
        """(pairs,) of the margins."""
        dimensions = self.features.shape[1]
        across = self.incidence @ covariance[dimensions:]
        own = self.features @ covariance[:dimensions, :dimensions] + 2 * across[:, :dimensions]
        answers = np.asarray(self.incidence.multiply(across[:, dimensions:]).sum(1)).ravel()
        return np.einsum("ij,ij->i", own, self.features) + answers


def likelihood(margins: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """(pairs,) of the labels, of which the share `wrong` is turned around."""
    return np.maximum(wrong + (1 - 2 * wrong) * expit(margins), 1e-12)


def fit_strengths(
    design: Design, precision: np.ndarray, wrong: np.ndarray, counted: np.ndarray, start: np.ndarray | None = None
) -> np.ndarray:
    """The most likely weights given the labels of the pairs `counted` (1 or 0), by damped Fisher scoring.

    `wrong` (pairs,) are the noise rates; above one half a label speaks for the rejected answer.
    """

    def loss(weights: np.ndarray) -> float:
        fit = np.log(likelihood(design.margins(weights), wrong)) @ counted
        return float(precision @ weights**2 / 2 - fit)

    weights = np.zeros(len(precision)) if start is None else start
    last = loss(weights)
    for _ in range(ITERATIONS):
        pull, information = _derivatives(design.margins(weights), wrong, counted)
        hessian = design.gram(information) + np.diag(precision)
        step = cho_solve(cho_factor(hessian, lower=True), design.transposed(pull) - precision * weights)
        size = 1.0
        while size > 1e-3 and loss(weights + size * step) > last:
            size /= 2
        if size <= 1e-3:
            break
        weights = weights + size * step
        before, last = last, loss(weights)
        if before - last < 1e-4 * abs(last):
            break
    return weights


def leave_each_out(
    design: Design, precision: np.ndarray, wrong: np.ndarray, counted: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """(pairs,) margins as they would be without the pair's own label.

    With the variance v of a margin and the information w of its label, the variance without the label is
    v / (1 - w v), and the margin loses the label's pull times that (Laplace's approximation of what the others say).
    The information is the expected one, as that observed may be negative and the sum of it no covariance's inverse.
    """
    margins = design.margins(weights)
    pull, information = _derivatives(margins, wrong, counted)
    hessian = design.gram(information) + np.diag(precision)
    variances = design.variances(cho_solve(cho_factor(hessian, lower=True), np.eye(len(precision))))
    return margins - pull * variances / (1 - np.minimum(information * variances, SHARPEST))


def _derivatives(margins: np.ndarray, wrong: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Derivative of the log likelihood of each label, and its expected information."""
    fits = likelihood(margins, wrong)
    slope = (1 - 2 * wrong) * expit(margins) * expit(-margins)
    return slope / fits * counted, slope**2 / np.maximum(fits * (1 - fits), 1e-12) * counted
