"""What the rows of a shape look like, the values they are told by, and the messages they become."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.data.formats import Row

logger = logging.getLogger(__name__)

Message = dict[str, str]
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
Convert = Callable[[Row], Iterable[Row]]


@dataclass(frozen=True)
class Form:
    """A shape of rows that convert one by one.

    `columns` are what the rows must have, each with what its values look like, by which a shape is guessed.
    `optional` are read where they are there. `convert` gives the canonical columns of one row: none where the
    original says that there is no preference, several where a row holds several; a value that cannot be used is None.
    `is_distinct` leaves out repeated prompts, for originals that repeat theirs by design.
    """

    columns: Mapping[str, Callable[[Any], bool]]
    convert: Convert
    optional: tuple[str, ...] = ()
    is_distinct: bool = False


# what values look like ----------------------------------------------------------------------------


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_flag(value: Any) -> bool:
    """True, false, 1 or 0, or one of them as the text of a CSV cell."""
    return as_flag(value) is not None


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def is_messages(value: Any) -> bool:
    """A list of turns, in either of the two ways of writing one."""
    return isinstance(value, list) and bool(value) and all(is_turn(turn) for turn in value)


def is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def has(*names: str) -> Callable[[Any], bool]:
    """Whether a value is an object with these keys."""
    return lambda value: isinstance(value, dict) and set(names) <= value.keys()


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


# reading values -----------------------------------------------------------------------------------


def as_flag(value: Any) -> bool | None:
    """The truth value of a flag, None for anything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def as_number(value: Any) -> float | None:
    """A finite number, also from a text such as '4' or '4.5'; None for anything else."""
    if isinstance(value, str):
        return float(value) if NUMBER.fullmatch(value.strip()) else None
    return value if is_number(value) else None


def mean(values: Iterable[Any]) -> float | None:
    """The mean of the values that are numbers, None where there is none."""
    numbers = [number for value in values if (number := as_number(value)) is not None]
    return sum(numbers) / len(numbers) if numbers else None


def draw(text: str) -> int:
    """A number that depends on the text alone, so that what is drawn by it is the same in every subset of a file."""
    return int(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16)


@functools.cache
def tell(sentence: str) -> None:
    """Log what was left out of a file, once, though the file is read in several loops."""
    logger.info(sentence)


# messages -----------------------------------------------------------------------------------------

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
"""Our roles by the names that speakers have elsewhere."""


def user(text: Any) -> list[Message] | None:
    """A conversation of one turn of the user's; None where `text` is no text."""
    return [{"role": "user", "content": text}] if isinstance(text, str) else None


def answer(text: Any) -> list[Message] | None:
    """One turn of the assistant's; None where `text` is no text."""
    return [{"role": "assistant", "content": text}] if isinstance(text, str) else None


def read_messages(value: Any, system: Any = None) -> list[Message] | None:
    """Turns written as {role, content} or {from, value}; None where one is neither, or its speaker unknown.

    `system` is put first where it is a text that says something.
    """
    if not is_messages(value):
        return None
    turns = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in value]
    if not all(str(role).lower() in ROLES and isinstance(text, str) for role, text in turns):
        return None
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return first + [{"role": ROLES[str(role).lower()], "content": text} for role, text in turns]


def cut_answer(messages: list[Message] | None) -> tuple[list[Message] | None, list[Message] | None]:
    """A conversation as what comes before its last turn, and that turn if it is the assistant's."""
    if not messages or messages[-1]["role"] != "assistant" or len(messages) < 2:
        return messages, None
    return messages[:-1], messages[-1:]


def cut_pair(
    chosen: list[Message] | None, rejected: list[Message] | None
) -> tuple[list[Message] | None, list[Message] | None, list[Message] | None]:
    """Two conversations as the prompt they share, up to a turn of the user's, and what follows it in either.

    All None where one of them is None or they share no turn of the user's.
    """
    if not chosen or not rejected:
        return None, None, None
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared += 1
    while shared and chosen[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    return (chosen[:shared], chosen[shared:], rejected[shared:]) if shared else (None, None, None)


# forms in common ----------------------------------------------------------------------------------


def prompt_only(read: Callable[[Row], Any]) -> Convert:
    """A conversion to a prompt alone."""
    return lambda row: [{"prompt": read(row)}]


def ranked(prompt: Any, first: Any, second: Any, lead: float | None) -> list[Row]:
    """The preference for the first answer if `lead` is above 0, for the second below, none at 0; `margin` is its size.

    Where `lead` is None the row says nothing of use, and its answers are None.
    """
    if lead is None:
        return [{"prompt": prompt, "chosen": None, "rejected": None}]
    if lead == 0:
        return []
    chosen, rejected = (first, second) if lead > 0 else (second, first)
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": abs(lead)}]


def picked(prompt: Any, first: Any, second: Any, is_first: bool | None) -> list[Row]:
    """The preference for one of two answers, without a margin; answers that are None where no choice can be read."""
    chosen, rejected = (first, second) if is_first else (second, first)
    return (
        [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]
        if is_first is not None
        else ranked(prompt, first, second, None)
    )
