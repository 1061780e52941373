"""Rewards by rule, with the signature of TRL's reward functions: `f(prompts, completions, **columns)`.

Completions are texts or lists of messages; the result is one number per completion.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from typing import Any

from rlhf.data.formats import completion_text
from rlhf.errors import UserError

FORM = re.compile(r"\s*<think>.*?</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
NUMBER = re.compile(r"[+-]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]*)?|[+-]?\.[0-9]+")
SCRIPTS = {"en": "LATIN", "zh": "CJK"}
"""How the Unicode names of a language's letters begin."""


def parse_answer(completion: Any) -> str | None:
    """What stands between the answer tags, or None where the form is not kept exactly.

    The form is `<think>…</think><answer>…</answer>` with nothing but white space around the two blocks, and each
    tag once.
    """
    text = completion_text(completion)
    match = FORM.fullmatch(text)
    return match["answer"].strip() if match and len(TAG.findall(text)) == 4 else None


def parse_number(text: str) -> Decimal | None:
    """The number that is the whole text, else None: a sign, `18.0` and commas between thousands are understood."""
    return Decimal(text.strip().replace(",", "")) if NUMBER.fullmatch(text.strip()) else None


def is_right(given: str | None, expected: Any) -> bool:
    """Whether both are the same number or, where neither is a number, the same text."""
    if given is None:
        return False
    number, wanted = parse_number(given), parse_number(str(expected))
    if number is None and wanted is None:
        return given == str(expected).strip()
    return number == wanted


def answer_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[Any] | None = None, **_: Any
) -> list[float]:
    """1 where the form is kept and the answer equals the column `answer`, 0 elsewhere.

    Raises UserError where a row has no answer to compare with.
    """
    expected = answer if answer is not None else [None] * len(completions)
    missing = next((row for row, right in enumerate(expected) if right is None), None)
    if missing is not None:
        raise UserError(
            f"the prompt {str(prompts[missing])[:60]!r} has no `answer`, which the reward 'answer' compares with; "
            "map that column in prepare.data.prompts.columns, or take another reward (evaluate.gold: judge)"
        )
    pairs = zip(completions, expected, strict=True)
    return [float(is_right(parse_answer(completion), right)) for completion, right in pairs]


def format_reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where the form is kept, 0 elsewhere."""
    return [float(parse_answer(completion) is not None) for completion in completions]


def length_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, shortest: int, longest: int, **_: Any
) -> list[float]:
    """1 within the band of characters, falling linearly to 0 at half of `shortest` and at twice `longest`."""
    lengths = [len(completion_text(completion)) for completion in completions]
    return [max(0.0, min(1.0, 2 * length / shortest - 1, 2 - length / longest)) for length in lengths]


def language_reward(prompts: Sequence[Any], completions: Sequence[Any], *, target: str, **_: Any) -> list[float]:
    """The share of letters, those of the tags left out, in the script of `target` (`en` or `zh`).

    An answer without letters gets 1: digits are right in every language, and it must not pay to add words to them.
    """
    texts = [TAG.sub("", completion_text(completion)) for completion in completions]
    letters = [[_script(character) for character in text if character.isalpha()] for text in texts]
    return [scripts.count(SCRIPTS[target]) / len(scripts) if scripts else 1.0 for scripts in letters]


@cache
def _script(letter: str) -> str:
    return re.split("[ -]", unicodedata.name(letter, ""))[0]
