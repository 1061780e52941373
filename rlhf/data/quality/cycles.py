"""Preferences that go round in a circle: a over b, b over c, c over a."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_ANSWERS = 512
"""Answers of one prompt that are compared, in the order met; more would take the cube of their number."""


@dataclass(frozen=True)
class Cycles:
    """Triples of answers to one prompt of which every two were compared, and those among them that go round.

    `on_cycle` says of every row whether it is part of such a circle, `(rows,)`; `example` is the rows of one, or empty;
    `left_out` counts rows that were not looked at, as their prompt has too many answers.
    """

    triples: int
    cyclic: int
    on_cycle: np.ndarray
    example: list[int]
    left_out: int


def find_cycles(prompts: np.ndarray, winners: np.ndarray, losers: np.ndarray) -> Cycles:
    """Circular triads (Kendall & Babington Smith, On the method of paired comparisons, Biometrika 1940).

    The three are keys, `(rows,)`. Of two answers compared several times the one preferred more often wins; where none
    is, they do not count as compared: contradictions are a check of their own.
    """
    on_cycle = np.zeros(len(prompts), dtype=bool)
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
        triples += round(float(((compared @ compared) * compared).sum())) // 6
        on_cycle[rows[is_in]] = through[first[is_in], second[is_in]] > 0
        if not example and through.any():
            example = _example(rows[is_in], first[is_in], second[is_in], beats, through)
    return Cycles(triples, cyclic, on_cycle, example, left_out)


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
