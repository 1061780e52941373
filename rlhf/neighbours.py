"""Which pairs nearby are labelled the other way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 10
SHOWN = 3
MOST_COMPARED = 20_000
"""A pair is compared with at most so many others, drawn at random."""
BLOCK = 512


@dataclass(frozen=True)
class Contradictions:
    """`counts` (pairs,): how many of the NEIGHBOURS contradict a label; `nearest`: where the first SHOWN are."""

    counts: np.ndarray
    nearest: list[list[int]]


def find_contradictions(differences: np.ndarray, seed: int) -> Contradictions:
    """Compare each pair with its nearest others, each in whichever orientation is nearer.

    With z = h_chosen - h_rejected, `differences` (pairs, dimensions), every dimension scaled to root mean square 1, the
    distance of pairs i and j is the smaller of ||z_i - z_j|| and ||z_i + z_j||. Where it is the second, j speaks for
    what i calls the rejected answer. Equal distances go to the pair that comes first.
    """
    spread = np.sqrt(np.square(differences, dtype=np.float64).mean(0))
    points = (differences / np.where(spread > 0, spread, 1.0)).astype(np.float32)
    others = np.sort(np.random.default_rng(seed).permutation(len(points))[:MOST_COMPARED])
    lengths = np.square(points).sum(1)
    counts = np.zeros(len(points), dtype=int)
    nearest: list[list[int]] = []
    wanted = min(NEIGHBOURS, len(others) - 1)
    for start in range(0, len(points), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(points)))
        products = points[rows] @ points[others].T
        distances = lengths[rows, None] + lengths[others] - 2 * np.abs(products)
        distances[others[None] == rows[:, None]] = np.inf
        near = np.sort(np.argpartition(distances, max(wanted - 1, 0), axis=1)[:, :wanted], axis=1)
        order = np.argsort(np.take_along_axis(distances, near, 1), axis=1, kind="stable")
        near = np.take_along_axis(near, order, 1)
        against = np.take_along_axis(products, near, 1) < 0
        counts[rows] = against.sum(1)
        nearest += [others[places[turned][:SHOWN]].tolist() for places, turned in zip(near, against, strict=True)]
    return Contradictions(counts, nearest)
