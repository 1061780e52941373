"""Rewards of how an answer is written: its length, its language, its words, its repetitions, its manners."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from rlhf.data.formats import completion_text
from rlhf.rewards.places import TAG

Measure = Callable[[str], int]
"""The length of a text, in characters or in tokens."""

# length -------------------------------------------------------------------------------------------


def length_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    shortest: int,
    longest: int,
    measure: Measure = len,
    **_: Any,
) -> list[float]:
    """1 within the band, falling linearly to 0 at half of `shortest` and at twice `longest`."""
    lengths = [measure(completion_text(completion)) for completion in completions]
    return [max(0.0, min(1.0, 2 * length / shortest - 1, 2 - length / longest)) for length in lengths]


def length_steps_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    shortest: int,
    longest: int,
    too_short: float,
    ideal: float,
    inside: float,
    too_long: float,
    measure: Measure = len,
    **_: Any,
) -> list[float]:
    """`too_short` below the band, `too_long` above, `ideal` in it up to twice `shortest`, `inside` beyond that."""

    def points(length: int) -> float:
        if length < shortest:
            return too_short
        if length > longest:
            return too_long
        return ideal if length <= 2 * shortest else inside

    return [points(measure(completion_text(completion))) for completion in completions]


# language -----------------------------------------------------------------------------------------

SCRIPTS = {"en": "LATIN", "zh": "CJK"}
"""How the Unicode names of a language's letters begin."""


def language_reward(prompts: Sequence[Any], completions: Sequence[Any], *, target: str, **_: Any) -> list[float]:
    """The share of letters, those of the tags left out, in the script of `target` (`en` or `zh`).

    An answer without letters gets 1: digits are right in every language, and it must not pay to add words to them.
    """
    texts = [TAG.sub("", completion_text(completion)) for completion in completions]
    letters = [[_script(character) for character in text if character.isalpha()] for text in texts]
    return [scripts.count(SCRIPTS[target]) / len(scripts) if scripts else 1.0 for scripts in letters]


def language_steps_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, target: str, much: float, little: float, **_: Any
) -> list[float]:
    """1 where the share that `language_reward` gives is above `much`, 0 where it is above `little`, else −1."""
    shares = language_reward(prompts, completions, target=target)
    return [1.0 if share > much else 0.0 if share > little else -1.0 for share in shares]


@cache
def _script(letter: str) -> str:
    return re.split("[ -]", unicodedata.name(letter, ""))[0]


# words --------------------------------------------------------------------------------------------

HAN = "\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+")
"""A word of letters and digits; of Chinese, which has no spaces, each character."""


def keywords_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, wanted: Sequence[str], forbidden: Sequence[str], **_: Any
) -> list[float]:
    """The share of `wanted` that occur less the share of `forbidden` that occur, in [−1, 1].

    Whole words, whatever their case; a keyword with Chinese in it may stand anywhere.
    """
    patterns = [[_keyword(word) for word in words] for words in (wanted, forbidden)]

    def share(text: str, words: Sequence[re.Pattern[str]]) -> float:
        return sum(word.search(text) is not None for word in words) / len(words) if words else 0.0

    texts = [completion_text(completion).casefold() for completion in completions]
    return [share(text, patterns[0]) - share(text, patterns[1]) for text in texts]


def _keyword(word: str) -> re.Pattern[str]:
    escaped = re.escape(word.casefold())
    return re.compile(escaped if re.search(f"[{HAN}]", word) else rf"(?<!\w){escaped}(?!\w)")


def repetition_reward(prompts: Sequence[Any], completions: Sequence[Any], *, ngram: int, **_: Any) -> list[float]:
    """Minus the share of n-grams of words that stood in the answer before: 0 where all differ, near −1 for a loop."""

    def penalty(text: str) -> float:
        words = WORD.findall(text.casefold())
        grams = [tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return [penalty(completion_text(completion)) for completion in completions]


# manners ------------------------------------------------------------------------------------------

REFUSAL = re.compile(
    r"\b(?:i|we)(?:'m| am|'re| are)? (?:really |very |so |simply |just )?"
    r"(?:can(?:no|')t|can not|won't|will not|unable to|not able to|not allowed to|not comfortable|must decline|"
    r"have to decline|refuse to|decline to)"
    r"(?: (?:to|with|in|help|assist|answer|provide|do|comply|fulfil|fulfill|support|share|give|discuss|engage|create|"
    r"generate|write|continue|responding|answering)\b|[.,!])"
    r"|\bas an ai\b"
    r"|(?:无法|不能|不可以|没办法|没法|拒绝|不便|不会)(?:为您|为你|向您|向你|给您|给你|在此)?"
    r"(?:回答|帮助|协助|提供|满足|完成|讨论|处理|帮|答复|回应)",
    re.IGNORECASE,
)
APOLOGY = re.compile(
    r"\b(?:sorry|apolog(?:y|ies|i[sz]e[sd]?|i[sz]ing)|forgive me|pardon me|i regret)\b"
    r"|抱歉|对不起|不好意思|请原谅|请见谅|致歉|道歉",
    re.IGNORECASE,
)


def refusal_reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """−1 for an answer with a sentence that refuses, in English or Chinese, else 0."""
    return [-float(_matches(REFUSAL, completion)) for completion in completions]


def apology_reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """−1 for an answer with a word of apology, in English or Chinese, else 0."""
    return [-float(_matches(APOLOGY, completion)) for completion in completions]


def _matches(pattern: re.Pattern[str], completion: Any) -> bool:
    return pattern.search(completion_text(completion).replace("’", "'")) is not None
