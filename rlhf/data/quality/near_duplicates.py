"""Rows that nearly repeat another: MinHash sketches of their runs of words, compared where a band of them agrees.

Broder, On the resemblance and containment of documents, 1997. A sketch keeps one byte per permutation (Li & König,
b-bit minwise hashing, WWW 2010), so that a million rows of two texts take 128 MB.
"""

from __future__ import annotations

import numpy as np

from rlhf.data.formats import SPLITS
from rlhf.data.quality.words import Words, hash_runs, mix

PERMUTATIONS = 64
"""The standard error of an estimated resemblance r is sqrt(r (1 - r) / 64): 5 points at .8."""
RUN = 3
"""Words per run."""
RESEMBLANCE = 0.8
"""Shared runs among all runs of both texts, from where on they are near duplicates."""
_BAND = 4
"""Bytes of a sketch that must agree before two rows are compared: at 16 bands or more, 99.9 % of pairs at .8."""
_NO_RUN = np.uint32(2**32 - 1)


def find_minima(words: Words) -> np.ndarray:
    """The least hash of a text's runs under every permutation, (texts, 64); that of two texts together is the lesser.

    The permutations are the same whenever they are used.
    """
    runs, counts = hash_runs(words, RUN)
    minima = np.full((PERMUTATIONS, len(counts)), _NO_RUN, dtype=np.uint32)
    has_runs = counts > 0
    starts = (counts.cumsum() - counts)[has_runs]
    if len(runs):
        short = (runs >> np.uint64(32)).astype(np.uint32)
        numbers = mix(np.arange(1, 2 * PERMUTATIONS + 1, dtype=np.uint64)).astype(np.uint32)
        for own, (factor, shift) in zip(minima, numbers.reshape(PERMUTATIONS, 2), strict=True):
            own[has_runs] = np.minimum.reduceat(short * (factor | np.uint32(1)) + shift, starts)
    return minima.T


def sketch(minima: np.ndarray) -> np.ndarray:
    """A byte for every minimum."""
    marked = minima.astype(np.uint64) + (np.arange(PERMUTATIONS, dtype=np.uint64) << np.uint64(32))
    return (mix(marked) >> np.uint64(56)).astype(np.uint8)


def resemblance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The estimated share of runs that two texts have in common; sketches are (..., 64)."""
    agreeing = (first == second).mean(axis=-1)
    return np.maximum(0.0, (agreeing - 1 / 256) / (1 - 1 / 256))  # one byte in 256 agrees by chance


def find_near_duplicates(sketches: np.ndarray, contents: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For every row an earlier one of its group that it nearly repeats, or -1: `(rows,)`.

    `sketches` are (rows, texts, 64): every text of a row must resemble the other row's. Rows of equal `contents` do not
    count as near: they repeat each other exactly. `groups` are the places of their splits in SPLITS. Rows of which a
    band agrees are compared with the first such row and with the one before, not each with each, so that a million
    alike take no longer than a million others.
    """
    rows, texts, _ = sketches.shape
    twins = np.full(rows, -1, dtype=np.int64)
    if not rows:
        return twins
    width = _BAND // texts
    bands = sketches.reshape(rows, texts, -1, width).transpose(2, 0, 1, 3)
    for band in bands:
        agreed = np.ascontiguousarray(band.reshape(rows, _BAND)).view(np.uint32)[:, 0]
        keys = agreed.astype(np.uint64) * np.uint64(len(SPLITS)) + groups.astype(np.uint64)
        order = np.argsort(keys, kind="stable")
        is_same = np.concatenate([[False], keys[order][1:] == keys[order][:-1]])
        run_starts = np.maximum.accumulate(np.where(is_same, 0, np.arange(rows)))
        later = np.flatnonzero(is_same)
        for earlier in (run_starts[later], later - 1):
            _pair(twins, order[earlier], order[later], sketches, contents)
    return twins


def _pair(
    twins: np.ndarray, earlier: np.ndarray, later: np.ndarray, sketches: np.ndarray, contents: np.ndarray
) -> None:
    """Note the earlier row for those later ones that have none yet and resemble it."""
    is_open = (twins[later] < 0) & (contents[earlier] != contents[later])
    for part in np.array_split(np.flatnonzero(is_open), 1 + len(later) // 100_000):
        one, other = earlier[part], later[part]
        is_near = (resemblance(sketches[one], sketches[other]) >= RESEMBLANCE).all(axis=1)
        twins[other[is_near]] = one[is_near]
