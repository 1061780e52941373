"""Answers drawn from a policy: one batch at a time, by one process or by several that share its luck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf.data.formats import Row
from rlhf.encoding import encode_prompt
from rlhf.models import own_generation_habits_off
from rlhf.params import SamplingParams
from rlhf.policies.actors import Batch
from rlhf.policies.ranking import shape_answer
from rlhf.policies.vllm import VLLMEngine
from rlhf.team import Team


def sample(
    params: SamplingParams, policy: Any, tokenizer: Any, rows: Sequence[Row], source: Source | None = None
) -> tuple[Batch, Tensor]:
    """Answers drawn at `temperature`, and which of them ended by themselves: (batch,) booleans.

    Transformers draws them, with SharedLuck those that one process would have drawn for the whole batch; or vLLM.
    """
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    length = max(len(ids) for ids in prompts)
    gaps = [length - len(ids) for ids in prompts]
    padded = [[tokenizer.pad_token_id] * gap + ids for gap, ids in zip(gaps, prompts, strict=True)]
    left = torch.tensor(padded, device=policy.device)
    attention = torch.tensor([[0] * gap + [1] * (length - gap) for gap in gaps], device=policy.device)
    if isinstance(source, VLLMEngine):
        answers = [torch.tensor(ids, device=policy.device) for ids in source.answer(prompts)]
        right = pad_sequence(answers, batch_first=True, padding_value=tokenizer.pad_token_id)
    else:
        right = _generate(params, policy, tokenizer, (left, attention), source)[:, length:]
    ends = right == tokenizer.eos_token_id
    # A response reaches up to and including its first end token, whatever pads behind it.
    mask = (ends.cumsum(1) - ends.long()) == 0
    return Batch(torch.cat([left, right], 1), torch.cat([attention, mask.long()], 1), length), ends.any(1)


def _generate(
    params: SamplingParams, policy: Any, tokenizer: Any, prompts: tuple[Tensor, Tensor], luck: SharedLuck | None
) -> Tensor:
    """Prompts and answers by transformers, from padded prompts and their attention."""
    chance = {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": 1.0}
    # All settings at once: a repetition penalty in the model's own generation_config would bend what is sampled.
    settings = GenerationConfig(
        max_new_tokens=params.max_new_tokens,
        **({"do_sample": False} if luck else chance),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with own_generation_habits_off(policy):
        tokens = policy.generate(
            input_ids=prompts[0],
            attention_mask=prompts[1],
            generation_config=settings,
            logits_processor=LogitsProcessorList([luck] if luck else []),
        )
    if luck:
        luck.draw_what_others_drew()
    return tokens


@dataclass
class SharedLuck(LogitsProcessor):
    """Makes of the most likely next token one drawn at `temperature`, by luck drawn for the batch of all processes.

    `rows` are this process's rows among `total`. torch.multinomial divides probabilities by exponential draws and takes
    the largest: so does this, of the same draws, and several processes sample what one of them would.
    """

    team: Team
    rows: range
    total: int
    temperature: float
    draws: int = 0
    like: Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, vocabulary) scores of the next token, whose largest is the one drawn."""
        self.like = scores
        luck = self._draw()[self.rows.start : self.rows.stop]
        return (scores.float() / self.temperature).log_softmax(-1) - luck.log()

    def draw_what_others_drew(self) -> None:
        """Answers of other processes may be longer; random numbers go on as theirs do."""
        for _ in range(max(self.team.gather(self.draws)) - self.draws):
            self._draw()

    def _draw(self) -> Tensor:
        self.draws += 1
        return torch.empty(self.total, self.like.shape[1], device=self.like.device).exponential_()


Source = SharedLuck | VLLMEngine
"""Whence answers come, where not from transformers alone."""


def read_answers(rows: Sequence[Row], batch: Batch, tokenizer: Any) -> list[Any]:
    """The answers, in the form of their prompts."""
    texts = tokenizer.batch_decode(
        [tokens[mask.bool()] for tokens, mask in zip(batch.responses, batch.mask, strict=True)],
        skip_special_tokens=True,
    )
    return [shape_answer(row["prompt"], text) for row, text in zip(rows, texts, strict=True)]
