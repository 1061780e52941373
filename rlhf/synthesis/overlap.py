"""Texts too much like one another, by ROUGE-L, among many at once."""

from __future__ import annotations

import re
from array import array
from collections import Counter

import numpy as np

_TOKEN = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u0e00-\u0eff\u3040-\u9fff\uf900-\ufaff]+"
)
"""A run of letters and digits; in scripts without spaces between words, a letter."""
_ROUNDING = 1e-9


def split_words(text: str) -> list[str]:
    """The words of a text in small letters. Those of plain English are the ones that rouge-score finds."""
    return _TOKEN.findall(text.lower())


class _Tokenizer:
    """`split_words` as rouge-score calls it: its own tokenizer sees no letter beyond a to z."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


class OverlapIndex:
    """Texts, and whether one of them is too much like another.

    Overlap is ROUGE-L's F: 2 L / (m + n), L being the longest common subsequence of m and n words (Lin, 2004). L is
    never more than the words that both have, counted with repetitions, so only texts are compared for which already
    these reach the limit: no match is lost, and few comparisons are left.
    """

    def __init__(self, limit: float) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self.limit = limit
        self.compared = 0
        self._scorer = RougeScorer(["rougeL"], tokenizer=_Tokenizer())
        self._texts: list[str] = []
        self._lengths = array("q")
        self._holders: dict[tuple[str, int], array[int]] = {}

    def add(self, text: str) -> None:
        """Take in a text."""
        words = split_words(text)
        for entry in _numbered(words):
            self._holders.setdefault(entry, array("q")).append(len(self._texts))
        self._texts.append(text)
        self._lengths.append(len(words))

    def find(self, text: str) -> str | None:
        """A text whose overlap with this one reaches the limit; None where there is none."""
        words = split_words(text)
        holders = [self._holders[entry] for entry in _numbered(words) if entry in self._holders]
        if not holders:
            return None
        shared = np.bincount(np.concatenate(holders), minlength=len(self._texts))
        bounds = 2 * shared / (np.array(self._lengths) + len(words))
        likely = np.flatnonzero(bounds >= self.limit - _ROUNDING)
        for place in likely[np.argsort(-bounds[likely], kind="stable")]:
            if self.measure(self._texts[place], text) >= self.limit - _ROUNDING:
                return self._texts[place]
        return None

    def measure(self, one: str, other: str) -> float:
        """ROUGE-L's F of two texts, between 0 and 1."""
        self.compared += 1
        return float(self._scorer.score(one, other)["rougeL"].fmeasure)


def _numbered(words: list[str]) -> list[tuple[str, int]]:
    """Every word with how often it stood before, so that the entries of two texts meet as often as both have it."""
    return [(word, earlier) for word, count in Counter(words).items() for earlier in range(count)]
