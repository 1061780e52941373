"""Rows as token ids: what a policy is trained on and continues, and what a reward model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.data.formats import Row, apply_template, completion_text, is_conversational, render_prompt

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a token that does not count in the loss."""


@dataclass(frozen=True)
class Demonstration:
    """One row for supervised fine-tuning; labels are IGNORED on the prompt."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


def encode_demonstration(tokenizer: Any, row: Row, max_length: int) -> Demonstration:
    """Prompt and completion in one sequence that ends with the end token, cut at `max_length` tokens.

    The loss starts at the first token that differs from those of the prompt alone: where the last token of the
    prompt merges with the first of the completion, the merged one counts as completion.
    """
    prompt_ids = encode_prompt(tokenizer, row["prompt"])
    ids = encode_answer(tokenizer, row["prompt"], row["completion"])
    start = 0
    while start < min(len(prompt_ids), len(ids)) and prompt_ids[start] == ids[start]:
        start += 1
    labels = [IGNORED] * start + ids[start:]
    return Demonstration(ids[:max_length], labels[:max_length], len(ids) > max_length)


def encode_prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """The ids a policy continues; `prompt` is a text or a list of messages."""
    return _tokenize(tokenizer, prompt, render_prompt(tokenizer, prompt))


def encode_answer(tokenizer: Any, prompt: Any, answer: Any) -> list[int]:
    """Prompt and answer with an end token after the last word, added where template and text have none.

    `answer` is a text or a list of messages; a text that answers a conversational prompt is the assistant's turn.
    """
    ids = _tokenize(tokenizer, prompt, _render(tokenizer, prompt, answer))
    last_turn = ids[-1:]
    if is_conversational(prompt):  # a template may write a line break after the end token
        last_turn = ids[len(encode_prompt(tokenizer, prompt)) :]
    return ids if tokenizer.eos_token_id in last_turn else [*ids, tokenizer.eos_token_id]


def _render(tokenizer: Any, prompt: Any, answer: Any) -> str:
    if not is_conversational(prompt):
        return prompt + completion_text(answer)
    messages = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return apply_template(tokenizer, [*prompt, *messages])


def _tokenize(tokenizer: Any, prompt: Any, text: str) -> list[int]:
    # A chat template writes the special tokens itself; the tokenizer would double the first.
    return tokenizer(text, add_special_tokens=not is_conversational(prompt))["input_ids"]


def pad_batch(sequences: Sequence[Sequence[int]], padding: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (batch, longest), padded on the right."""
    return {
        "input_ids": pad_right(sequences, padding),
        "attention_mask": pad_right([[1] * len(ids) for ids in sequences], 0),
    }


def pad_right(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(batch, longest): each sequence followed by as many `value` as it is shorter than the longest."""
    import torch

    longest = max(len(numbers) for numbers in sequences)
    return torch.tensor([[*numbers, *[value] * (longest - len(numbers))] for numbers in sequences])
