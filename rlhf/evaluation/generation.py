"""Answers drawn from a model so that neither batches nor other models change them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf.encoding import encode_prompt
from rlhf.models import own_generation_habits_off


@dataclass(frozen=True)
class Completion:
    """One answer: its text, its token ids up to and including the end token, and whether it ended by itself."""

    text: str
    token_ids: list[int]
    ended: bool


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn; temperature 0 takes the likeliest token each time."""

    max_new_tokens: int
    temperature: float
    batch_size: int
    seed: int


def generate(model: Any, tokenizer: Any, prompts: Sequence[Any], decoding: Decoding) -> list[Completion]:
    """One answer per prompt (a text or a list of messages), in the order given.

    The randomness of an answer comes from the seed and the prompt's place alone: the batch size does not change it,
    and two models answer the same prompt with the same luck, which makes their comparison more precise.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    answers: dict[int, Completion] = {}
    for start in range(0, len(order), decoding.batch_size):
        chosen = order[start : start + decoding.batch_size]
        noise = GumbelNoise(decoding, chosen) if decoding.temperature > 0 else None
        tokens = _continue(model, tokenizer, [encoded[index] for index in chosen], decoding.max_new_tokens, noise)
        answers |= {index: _read(ids, tokenizer) for index, ids in zip(chosen, tokens, strict=True)}
    return [answers[index] for index in range(len(prompts))]


class GumbelNoise(LogitsProcessor):
    """Turns the choice of the likeliest token into a draw from the softmax at `temperature`.

    The argmax of logits/T + Gumbel noise is such a draw (Maddison et al., arXiv 1411.0030); each row of the batch
    has a generator of its own.
    """

    def __init__(self, decoding: Decoding, rows: Sequence[int]) -> None:
        self._temperature = decoding.temperature
        # A prime apart, so that near seeds do not share rows.
        seeds = [decoding.seed + 1_000_003 * (row + 1) for row in rows]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (batch, vocabulary) with noise; drawn on the CPU, so that every device gets the same."""
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        gumbel = -noise.clamp_min(torch.finfo(noise.dtype).tiny).log()
        return scores.float() / self._temperature + gumbel.to(scores.device)


@torch.inference_mode()
def _continue(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, noise: GumbelNoise | None
) -> list[list[int]]:
    """The new token ids of each prompt, whatever stands behind the end token included."""
    longest = max(len(ids) for ids in prompts)
    gaps = [longest - len(ids) for ids in prompts]
    tokens = torch.tensor([[tokenizer.pad_token_id] * gap + ids for gap, ids in zip(gaps, prompts, strict=True)])
    attention = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with own_generation_habits_off(model):
        output = model.generate(
            input_ids=tokens.to(model.device),
            attention_mask=attention.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([noise] if noise else []),
        )
    return output[:, longest:].tolist()


def _read(ids: list[int], tokenizer: Any) -> Completion:
    """Cut behind the first end token: where padding and end are the same token, only the first one is real."""
    ended = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id) + 1] if ended else ids
    return Completion(tokenizer.decode(kept, skip_special_tokens=True), kept, ended)
