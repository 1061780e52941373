"""Rewards of answers that can be looked up: the right text or number, a number nearly right, a whole number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from rlhf.errors import UserError
from rlhf.params import Place
from rlhf.params.rewards import Band
from rlhf.rewards.places import find_answer

NUMBER = re.compile(r"[+-]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]*)?|[+-]?\.[0-9]+")


def parse_number(text: str) -> Decimal | None:
    """The number that is the whole text, else None: a sign, `18.0` and commas between thousands are understood."""
    return Decimal(text.strip().replace(",", "")) if NUMBER.fullmatch(text.strip()) else None


def is_right(given: str | None, expected: Any) -> bool:
    """Whether both are the same number or, where neither is a number, the same text but for white space around it."""
    if given is None:
        return False
    number, wanted = parse_number(given), parse_number(str(expected))
    if number is None and wanted is None:
        return given.strip() == str(expected).strip()
    return number == wanted


def expected_answers(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any] | None) -> Sequence[Any]:
    """The column `answer`. Raises UserError where a row has nothing to compare with."""
    expected = answer if answer is not None else [None] * len(completions)
    missing = next((row for row, right in enumerate(expected) if right is None), None)
    if missing is not None:
        raise UserError(
            f"the prompt {str(prompts[missing])[:60]!r} has no `answer`, which the reward 'answer' compares with; "
            "map that column in prepare.data.prompts.columns, or take another reward (evaluate.gold: judge)"
        )
    return expected


def answer_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    answer: Sequence[Any] | None = None,
    answer_in: Place = "form",
    **_: Any,
) -> list[float]:
    """1 where the answer stands at `answer_in` and equals the column `answer` as a number or a text, 0 elsewhere."""
    expected = expected_answers(prompts, completions, answer)
    pairs = zip(completions, expected, strict=True)
    return [float(is_right(find_answer(completion, answer_in), right)) for completion, right in pairs]


def number_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    answer: Sequence[Any] | None = None,
    answer_in: Place,
    exact: float,
    same: float,
    bands: Sequence[Band],
    wrong: float,
    missing: float,
    **_: Any,
) -> list[float]:
    """Partial credit for a number: the highest step that it reaches.

    `exact` for the very characters of the column `answer`, `same` for the same number or text but for white space and
    spelling, then the points of the first of `bands` in which |given ÷ right − 1| is at most `within`, else `wrong`;
    `missing` where nothing stands at `answer_in`. A right answer of 0 has no ratio, and none but itself is near it.
    """

    def points(given: str | None, right: str) -> float:
        if given is None:
            return missing
        if given == right:
            return exact
        if is_right(given, right):
            return same
        number, wanted = parse_number(given), parse_number(right)
        if number is None or not wanted:
            return wrong
        distance = abs(number - wanted) / abs(wanted)
        return next((band.points for band in bands if distance <= Decimal(str(band.within))), wrong)

    expected = expected_answers(prompts, completions, answer)
    pairs = zip(completions, expected, strict=True)
    return [points(find_answer(completion, answer_in), str(right)) for completion, right in pairs]


def integer_reward(prompts: Sequence[Any], completions: Sequence[Any], *, answer_in: Place, **_: Any) -> list[float]:
    """1 where a whole number stands at `answer_in`, right or wrong (`18.0` is one), 0 elsewhere."""

    def is_whole(given: str | None) -> bool:
        number = None if given is None else parse_number(given)
        return number is not None and number == number.to_integral_value()

    return [float(is_whole(find_answer(completion, answer_in))) for completion in completions]
