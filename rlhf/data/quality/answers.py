"""What an answer gives away: the prompt or the other answer in it, and its looks, which a reward model may learn."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

LEAST_CHARACTERS = 20
"""Shorter texts stand in others by chance."""
GREATEST_EFFECT = 10.0
"""Stands for a difference that is the same in every pair."""

_LIST = re.compile(r"^[ \t]*(?:[-*•+]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_MARKUP = re.compile(r"^#{1,6} |\*\*|__|`+|^\|", re.MULTILINE)
_REFUSAL = re.compile(
    r"\b(?:i['’]?m (?:very |so )?sorry|i (?:cannot|can['’]?t|am unable|am not able|won['’]t)|as an ai|i must decline)\b"
    r"|抱歉|对不起|我(?:无法|不能)|作为(?:一个|一名)?(?:人工智能|AI)",
    re.IGNORECASE,
)


def _digits(text: str) -> int:
    return sum(map(text.count, "0123456789"))


STYLE: dict[str, Callable[[str], float]] = {
    "characters": len,
    "exclamations": lambda text: text.count("!") + text.count("\uff01"),
    "digits": _digits,
    "lists": lambda text: len(_LIST.findall(text)),
    "markup": lambda text: len(_MARKUP.findall(text)),
    "refusal": lambda text: float(_REFUSAL.search(text[:200]) is not None),
}
"""Marks of style that one can count; list items by line, Markdown by sign, a refusal by the first words."""


def last_turn(prompt: Any) -> str:
    """What is asked last: the prompt's text, or that of its last message."""
    return prompt[-1]["content"] if isinstance(prompt, list) else prompt


def holds(plain: str, other: str) -> bool:
    """Whether the other plain text, of twenty characters or more, stands in this one."""
    return len(other) >= LEAST_CHARACTERS and other in plain


def make_plain(text: str) -> str:
    """The text in small letters, with single spaces."""
    return " ".join(text.casefold().split())


def standardise(differences: np.ndarray) -> np.ndarray:
    """Paired differences in units of their standard deviation, so that their mean is Cohen's d_z; `(rows,)`.

    d_z = mean(x) / sd(x), x = chosen - rejected, sd with n - 1 (Cohen, Statistical power analysis, 1988, p. 48);
    .2 is called small, .5 medium, .8 large. Without any spread it is 0, or ±10 where all differ alike.
    """
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    if spread == 0:
        return np.sign(differences) * GREATEST_EFFECT
    return np.clip(differences / spread, -1e6, 1e6)
