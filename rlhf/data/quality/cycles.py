"""Preferences that go round in a circle: a over b, b over c, c over a."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_ANSWERS = 512
"""Answers of one prompt that are compared, in the order met; more would take the cube of their number."""


@dataclass(frozen=True)
class Cycles:
    """Triples of answers to one prompt of which every two were compared, and those among them that go round.

    `shares` says of every row how many of the triples it belongs to go round, `(rows,)`, NaN where it belongs to none
    or is outvoted; preferences by lot make it a quarter. `example` is the rows of one circle, or empty; `left_out`
    counts rows that were not looked at, as their prompt has too many answers.
    """

    triples: int
    cyclic: int
    shares: np.ndarray
    example: list[int]
    left_out: int


def find_cycles(prompts: np.ndarray, winners: np.ndarray, losers: np.ndarray) -> Cycles:
    """Circular triads (Kendall & Babington Smith, On the method of paired comparisons, Biometrika 1940).

    The three are keys, `(rows,)`. Of two answers compared several times the one preferred more often wins; where none
    is, they do not count as compared: contradictions are a check of their own.
    """
    shares = np.full(len(prompts), np.nan)
    triples, cyclic, left_out, example = 0, 0, 0, list[int]()
    order = np.argsort(prompts, kind="stable")
    borders = np.flatnonzero(prompts[order][1:] != prompts[order][:-1]) + 1
    for rows in np.split(order, borders):
        if len(rows) < 3:
            continue
        beats, first, second = _tournament(winners[rows], losers[rows])
        is_in = (first < len(beats)) & (second < len(beats))
        left_out += int((~is_in).sum())
        through = (beats @ beats).T * beats  # ways back from the loser to the winner, over one other answer
        compared = beats + beats.T
        cyclic += round(float(through.sum())) // 3
        around = (compared @ compared) * beats
        triples += round(float(around.sum())) // 3
        own = (first[is_in], second[is_in])
        shares[rows[is_in]] = np.where(around[own] > 0, through[own] / np.maximum(around[own], 1), np.nan)
        if not example and through.any():
            example = _example(rows[is_in], first[is_in], second[is_in], beats, through)
    return Cycles(triples, cyclic, shares, example, left_out)


def _tournament(winners: np.ndarray, losers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who beats whom, (answers, answers), and the winner's and the loser's number in every row, in the order met."""
    met = np.stack([winners, losers], axis=1).ravel()
    _, first_places, places = np.unique(met, return_index=True, return_inverse=True)
    numbers = np.argsort(np.argsort(first_places))[places].reshape(-1, 2)
    size = min(len(first_places), MOST_ANSWERS)
    votes = np.zeros((size, size), dtype=np.float32)
    inside = numbers[(numbers < size).all(axis=1)]
    np.add.at(votes, (inside[:, 0], inside[:, 1]), 1)
    return (votes > votes.T).astype(np.float32), numbers[:, 0], numbers[:, 1]


def _example(
    rows: np.ndarray, first: np.ndarray, second: np.ndarray, beats: np.ndarray, through: np.ndarray
) -> list[int]:
    """The rows of the first circle: a over b, b over c, c over a."""
    start = int(np.flatnonzero(through[first, second] > 0)[0])
    a, b = first[start], second[start]
    c = int(np.flatnonzero((beats[b] > 0) & (beats[:, a] > 0))[0])
    return [int(rows[np.flatnonzero((first == one) & (second == other))[0]]) for one, other in ((a, b), (b, c), (c, a))]
