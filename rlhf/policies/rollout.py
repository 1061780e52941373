"""Rollouts: prompts in order, answers sampled for them, what the models think of each token, what rewards say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from rlhf.data.formats import Row
from rlhf.encoding import encode_prompt
from rlhf.models import own_generation_habits_off
from rlhf.params import PPOParams, SamplingParams
from rlhf.policies.actors import Batch, Models
from rlhf.policies.objectives import MAX_LOGITS, entropy, exact_kl, kl_estimate, token_log_probs
from rlhf.policies.ranking import shape_answer
from rlhf.scoring import Reward, mixed_reward


@dataclass
class Rollout:
    """Sampled answers with what policy, reference and critic thought of each token: (batch, response) each.

    `kl` is in nats per token, by the estimator asked for; `values` are None without a critic; `ended` is (batch,).
    """

    rows: list[Row]
    batch: Batch
    ended: Tensor
    log_probs: Tensor
    reference_log_probs: Tensor
    kl: Tensor
    entropy: Tensor
    values: Tensor | None


def prompt_batches(rows: Sequence[Row], size: int, group_size: int, seed: int) -> Iterator[list[Row]]:
    """Shuffled batches of `size` rows without end, each prompt `group_size` times in a row.

    A prompt comes again only when all others have come. The order follows from the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    prompts = size // group_size
    while True:
        while len(waiting) < prompts:
            waiting += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[index] for index in waiting[:prompts] for _ in range(group_size)]
        waiting = waiting[prompts:]


@torch.no_grad()
def roll_out(params: PPOParams, models: Models, tokenizer: Any, rows: list[Row]) -> Rollout:
    """Sample one answer per row and evaluate its tokens under all models.

    So few rows at a time that no more than MAX_LOGITS logits of a model stand in memory.
    """
    batch, ended = sample(params, models.policy, tokenizer, rows)
    vocabulary = models.policy.get_output_embeddings().weight.shape[0]
    size = max(1, MAX_LOGITS // (batch.responses.shape[1] * vocabulary))
    parts = [_evaluate(params, models, part) for part in batch.split(size)]
    names = ("log_probs", "reference_log_probs", "kl", "entropy")
    columns = {name: torch.cat([part[name] for part in parts]) for name in names}
    values = torch.cat([part["values"] for part in parts]) if "values" in parts[0] else None
    return Rollout(rows, batch, ended, values=values, **columns)


def _evaluate(params: PPOParams, models: Models, batch: Batch) -> dict[str, Tensor]:
    """The columns of a Rollout for some rows; logits are gone when it returns."""
    logits, values = models.read(batch)
    reference_logits = models.reference_logits(batch)
    log_probs = token_log_probs(logits, batch.responses, params.temperature)
    reference_log_probs = token_log_probs(reference_logits, batch.responses, params.temperature)
    columns = {
        "log_probs": log_probs,
        "reference_log_probs": reference_log_probs,
        "kl": (
            exact_kl(logits, reference_logits, params.temperature)
            if params.kl_estimator == "full"
            else kl_estimate(log_probs * batch.mask, reference_log_probs * batch.mask, params.kl_estimator)
        ),
        "entropy": entropy(logits, params.temperature),
    }
    return columns if values is None else columns | {"values": values}


def sample(params: SamplingParams, policy: Any, tokenizer: Any, rows: list[Row]) -> tuple[Batch, Tensor]:
    """Answers drawn at `temperature`, and which of them ended by themselves: (batch,) booleans."""
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    length = max(len(ids) for ids in prompts)
    gaps = [length - len(ids) for ids in prompts]
    padded = [[tokenizer.pad_token_id] * gap + ids for gap, ids in zip(gaps, prompts, strict=True)]
    attention = torch.tensor([[0] * gap + [1] * (length - gap) for gap in gaps], device=policy.device)
    # All settings at once: a repetition penalty in the model's own generation_config would bend what is sampled.
    settings = GenerationConfig(
        max_new_tokens=params.max_new_tokens,
        do_sample=True,
        temperature=params.temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with own_generation_habits_off(policy):
        tokens = policy.generate(
            input_ids=torch.tensor(padded, device=policy.device), attention_mask=attention, generation_config=settings
        )
    ends = tokens[:, length:] == tokenizer.eos_token_id
    # A response reaches up to and including its first end token, whatever pads behind it.
    mask = (ends.cumsum(1) - ends.long()) == 0
    return Batch(tokens, torch.cat([attention, mask.long()], 1), length), ends.any(1)


def read_answers(rows: Sequence[Row], batch: Batch, tokenizer: Any) -> list[Any]:
    """The answers, in the form of their prompts."""
    texts = tokenizer.batch_decode(
        [tokens[mask.bool()] for tokens, mask in zip(batch.responses, batch.mask, strict=True)],
        skip_special_tokens=True,
    )
    return [shape_answer(row["prompt"], text) for row, text in zip(rows, texts, strict=True)]


def score_answers(
    rows: Sequence[Row], answers: Sequence[Any], rewards: Sequence[Reward]
) -> tuple[list[float], dict[str, list[float]]]:
    """The weighted reward of each answer, and each reward's own values; the rows' other columns reach the rewards."""
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    return mixed_reward(rewards, [row["prompt"] for row in rows], answers, columns)


def judge(rollout: Rollout, tokenizer: Any, rewards: Sequence[Reward]) -> tuple[Tensor, dict[str, float]]:
    """The weighted reward of each answer (batch,), and each reward's mean."""
    answers = read_answers(rollout.rows, rollout.batch, tokenizer)
    total, parts = score_answers(rollout.rows, answers, rewards)
    figures = {f"rewards/{name}": sum(values) / len(values) for name, values in parts.items()}
    return torch.tensor(total, device=rollout.ended.device), figures
