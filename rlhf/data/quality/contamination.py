"""How much of a held-out prompt stands word for word in what the models train on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rlhf.data.quality.words import Words, hash_runs, hash_words

RUN = 13
"""Words per run, punctuation and case aside: the longest that Brown et al. (GPT-3, 2020, appendix C) take."""
MUCH = 0.8
"""The share of seen runs from which on a prompt is contaminated: as Touvron et al. (Llama 2, 2023, A.6) call a sample
dirty."""


class HeldOut:
    """The runs of 13 words of held-out prompts, and which of them training texts hold.

    Twenty-one bytes for every run: prompts of a hundred words, a million of them, take 2 GB.
    """

    def __init__(self, batches: Iterable[Words]) -> None:
        """From the words of the prompts, in batches. A prompt of fewer than 13 words is not judged."""
        parts = [_runs_of(batch) for batch in batches] or [_runs_of(hash_words([]))]
        runs = np.concatenate([runs for runs, _ in parts])
        self._counts = np.concatenate([counts for _, counts in parts])
        self._known, self._places = np.unique(runs, return_inverse=True)
        self._is_seen = np.zeros(len(self._known), dtype=bool)

    def mark(self, words: Words) -> None:
        """Note which runs stand in these training texts."""
        if len(self._known):
            runs = np.sort(_runs_of(words)[0])  # looked up in order they are found faster
            places = np.minimum(np.searchsorted(self._known, runs), len(self._known) - 1)
            self._is_seen[places[self._known[places] == runs]] = True

    def shares(self) -> np.ndarray:
        """The share of every prompt's runs that was seen, in the order given; NaN for one too short to judge."""
        prompts = np.repeat(np.arange(len(self._counts)), self._counts)
        seen = np.bincount(prompts, weights=self._is_seen[self._places], minlength=len(self._counts))
        return np.where(self._counts > 0, seen / np.maximum(self._counts, 1), np.nan)


def _runs_of(words: Words) -> tuple[np.ndarray, np.ndarray]:
    runs, counts = hash_runs(words, RUN)
    is_long = words.counts >= RUN
    return runs[np.repeat(is_long, counts)], np.where(is_long, counts, 0)
