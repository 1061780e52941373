"""Rows as token ids: what a policy is trained on and continues, and what a reward model reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.data.formats import Row, apply_template, completion_text, is_conversational, render_prompt

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a token that does not count in the loss."""


@dataclass(frozen=True)
class Reading:
    """A row as a model reads it: the ids of each of its sequences, and where in each the answer begins.

    A demonstration and a rated answer have one sequence, a pair has two; of a prompt no answer begins.
    """

    row: str
    sequences: tuple[list[int], ...]
    starts: tuple[int, ...]

    @property
    def answers(self) -> list[list[int]]:
        """The part of each sequence that is an answer, its end token included."""
        return [ids[start:] for ids, start in zip(self.sequences, self.starts, strict=False)]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))


def read_answer(tokenizer: Any, row: Row, *columns: str) -> Reading:
    """Prompt and answer in one sequence that ends with the end token, for each of the columns that hold an answer.

    The answer begins at the first token that differs from those of the prompt alone: where the last token of the
    prompt merges with the first of the answer, the merged one counts as the answer's.
    """
    prompt_ids = encode_prompt(tokenizer, row["prompt"])
    sequences = tuple(encode_answer(tokenizer, row["prompt"], row[column]) for column in columns)
    return Reading(row["id"], sequences, tuple(_shared(prompt_ids, ids) for ids in sequences))


def _shared(prompt_ids: list[int], ids: list[int]) -> int:
    """How many tokens the two have in common at the start."""
    start = 0
    while start < min(len(prompt_ids), len(ids)) and prompt_ids[start] == ids[start]:
        start += 1
    return start


def read_prompt(tokenizer: Any, row: Row) -> Reading:
    """The prompt alone."""
    return Reading(row["id"], (encode_prompt(tokenizer, row["prompt"]),), ())


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


def describe_template(tokenizer: Any) -> dict[str, Any]:
    """By what texts become tokens: the chat template's hash, the special tokens' ids, the vocabulary's size."""
    template = tokenizer.chat_template
    return {
        "chat_template": hashlib.sha256(template.encode()).hexdigest()[:16] if template else None,
        "begin_token_id": tokenizer.bos_token_id,
        "end_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        "vocabulary": len(tokenizer),
    }


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
