"""What can be seen of a text without understanding it: marks that one counts, and which letters follow each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from rlhf.data.quality.answers import STYLE

LETTER_DIMENSIONS = 32
READ = 1000
"""So many characters of a text are searched for sequences of letters."""
RAREST = 3
"""Sequences in fewer texts than this are left out."""
LEARNT_FROM = 5000
"""The directions are found in at most so many texts, drawn at random, which bounds time and memory."""

_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"[.!?]+(?=\s|$)|[。！？]+")


def _count(signs: str) -> Callable[[str], float]:
    return lambda text: sum(map(text.count, signs))


def _distinct(text: str) -> float:
    words = _WORD.findall(text.casefold())
    return len(set(words)) / max(1.0, len(words)) ** 0.5


COUNTS: dict[str, Callable[[str], float]] = {
    **STYLE,
    "words": lambda text: len(_WORD.findall(text)),
    "sentences": lambda text: len(_SENTENCE.findall(text)),
    "full stops": _count(".。"),
    "commas": _count(",，、"),
    "questions": _count("?？"),
    "quotations": _count("\"'“”‘’「」"),
    "brackets": _count("()[]{}（）"),
    "dashes and colons": _count("-–—:;：；"),
    "line breaks": _count("\n"),
    "capitals": lambda text: sum(map(str.isupper, text)),
    "words in capitals": lambda text: sum(len(word) > 1 and word.isupper() for word in _WORD.findall(text)),
}
"""Of these the logarithm of one more is taken: beside that of the words it says how frequent they are, too."""
MEASURES: dict[str, Callable[[str], float]] = {
    "letters per word": lambda text: float(np.mean([len(word) for word in _WORD.findall(text)] or [0])),
    "distinct words": _distinct,
    "begins with a capital": lambda text: float(text.lstrip()[:1].isupper()),
    "ends with a mark": lambda text: float(text.rstrip()[-1:] in tuple(".!?\"')。！？”」")),
}


def read_surface(texts: Sequence[str], seed: int) -> np.ndarray:
    """(texts, dimensions) without mean and of deviation 1: COUNTS, MEASURES, and LETTER_DIMENSIONS of letters.

    The last are the principal directions of sequences of two and three characters by tf-idf, fewer of few texts. They
    need no language, and know words as well as spelling.
    """
    counts = np.log1p([[count(text) for count in COUNTS.values()] for text in texts])
    measures = [[measure(text) for measure in MEASURES.values()] for text in texts]
    found = np.hstack([counts, measures, _read_letters(texts, seed)])
    spread = found.std(0)
    return (found - found.mean(0)) / np.where(spread > 1e-9, spread, 1.0)


def _read_letters(texts: Sequence[str], seed: int) -> np.ndarray:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.utils.extmath import randomized_svd

    read = [text[:READ] for text in texts]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(texts))[:LEARNT_FROM])
    frequencies = TfidfVectorizer(analyzer="char", ngram_range=(2, 3), min_df=RAREST, sublinear_tf=True)
    try:
        letters = frequencies.fit_transform([read[place] for place in drawn])
    except ValueError:  # no sequence of letters stands in so many texts
        return np.zeros((len(texts), 0))
    size = min(LETTER_DIMENSIONS, min(letters.shape) - 1)
    if size < 1:
        return np.zeros((len(texts), 0))
    directions = randomized_svd(letters, size, random_state=seed)[2].T
    blocks = [read[start : start + LEARNT_FROM] for start in range(0, len(read), LEARNT_FROM)]
    return np.vstack([frequencies.transform(block) @ directions for block in blocks])
