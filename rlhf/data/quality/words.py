"""The words of many texts at once, as hashes, and the runs of words in them: a loop over letters would take hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

SCRIPTS_WITHOUT_SPACES = ((0x0E00, 0x0EFF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
"""Thai and Lao, kana, and Han: a letter of theirs is a word."""
_LETTERS_APART = 256
"""After so many letters of a word the weights begin again."""
_NEXT_WORD = np.uint64(0x9E3779B97F4A7C15)
"""What a word's weight in a run is multiplied with for the next word; any large odd number."""


@dataclass(frozen=True)
class Words:
    """Hashes of the words of all texts, (words,), one text behind the other, and how many each has, (texts,)."""

    hashes: np.ndarray
    counts: np.ndarray


def mix(values: np.ndarray) -> np.ndarray:
    """Sixty-four bits that each depend on all bits of the value (SplitMix64: Steele, Lea & Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_words(texts: Sequence[str]) -> Words:
    """The words of every text: runs of letters and digits, case and punctuation aside."""
    codes = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    folded, stands_alone = _letters()
    letters = folded[codes]
    is_letter = letters > 0
    breaks_before = np.ones(len(codes), dtype=bool)
    breaks_before[1:] = ~is_letter[:-1] | stands_alone[codes[1:]] | stands_alone[codes[:-1]]
    starts = np.flatnonzero(is_letter & breaks_before)
    lengths = np.array([len(text) + 1 for text in texts], dtype=np.int64)
    counts = np.bincount(np.searchsorted(lengths.cumsum(), starts, side="right"), minlength=len(texts))
    if not len(starts):
        return Words(np.zeros(0, dtype=np.uint64), counts)
    places = np.flatnonzero(is_letter)
    firsts = np.searchsorted(places, starts)
    offsets = places - np.repeat(starts, np.diff(firsts, append=len(places)))
    weighed = letters[places].astype(np.uint64) * _weights()[offsets % _LETTERS_APART]
    return Words(mix(np.add.reduceat(weighed, firsts)), counts)


@cache
def _letters() -> tuple[np.ndarray, np.ndarray]:
    """By code point: the small letter or digit, 0 for anything else; and whether it is a word by itself."""
    small = [ord(chr(code).lower()[0]) if chr(code).isalnum() else 0 for code in range(0x110000)]
    alone = np.zeros(0x110000, dtype=bool)
    for first, last in SCRIPTS_WITHOUT_SPACES:
        alone[first : last + 1] = True
    return np.array(small, dtype=np.uint32), alone


@cache
def _weights() -> np.ndarray:
    """A large odd number for every place in a word."""
    return mix(np.arange(1, _LETTERS_APART + 1, dtype=np.uint64)) | np.uint64(1)


def hash_runs(words: Words, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of `size` words within a text (n-grams), and how many each text has, (texts,).

    A text of fewer words has one run, of all of them; an empty one has none.
    """
    ends = words.counts.cumsum().repeat(words.counts)  # behind the text of every word
    places = np.arange(len(words.hashes))
    begins = ends - words.counts.repeat(words.counts)
    starts = np.flatnonzero((places + size <= ends) | (places == begins))
    runs = np.zeros(len(starts), dtype=np.uint64)
    for step in range(size):
        behind = starts + step
        is_inside = behind < ends[starts]
        runs = runs * _NEXT_WORD + np.where(is_inside, words.hashes[np.where(is_inside, behind, 0)], np.uint64(0))
    counts = np.where(words.counts > 0, np.maximum(words.counts - size + 1, 1), 0)
    return mix(runs), counts
