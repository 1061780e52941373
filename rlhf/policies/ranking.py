"""From several answers to a prompt to a pair: which may stand in one, and which two do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.data.formats import is_conversational
from rlhf.encoding import encode_answer
from rlhf.policies.objectives import EQUAL


def shape_answer(prompt: Any, text: str) -> Any:
    """A text in the form of the prompt: one to a conversation is a list with the assistant's message, as TRL has it."""
    return [{"role": "assistant", "content": text}] if is_conversational(prompt) else text


def fits_when_read(tokenizer: Any, prompt: Any, answer: Any, limit: int) -> bool:
    """Whether prompt and answer have at most `limit` tokens when read again; tokens that are no text become more."""
    return len(encode_answer(tokenizer, prompt, answer)) <= limit


def best_and_worst(scores: Sequence[float], places: Sequence[int]) -> tuple[int, int] | None:
    """Of the places, that of the highest and of the lowest score, of equals the first; None where none is better."""
    if not places:
        return None
    best, worst = max(places, key=scores.__getitem__), min(places, key=scores.__getitem__)
    return (best, worst) if is_better(scores[best], scores[worst]) else None


def is_better(one: float, other: float) -> bool:
    """Whether a reward is higher than another by more than rounding."""
    return one - other > EQUAL
