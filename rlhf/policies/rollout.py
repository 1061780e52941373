"""Rollouts: prompts in order, answers sampled for them, what the models think of each token, what rewards say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.data.formats import Row
from rlhf.params import PPOParams
from rlhf.policies.actors import Batch, Models
from rlhf.policies.objectives import MAX_LOGITS, entropy, exact_kl, kl_estimate, token_log_probs
from rlhf.policies.sampling import SharedLuck, Source, read_answers, sample
from rlhf.scoring import Reward, mixed_reward
from rlhf.team import Team

Judged = tuple["Rollout", Tensor, dict[str, float]]
"""Answers, the raw reward of each, (batch,), and the mean of each reward."""


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
def roll_out(
    params: PPOParams, models: Models, tokenizer: Any, rows: list[Row], source: Source | None = None
) -> Rollout:
    """Sample one answer per row and evaluate its tokens under all models.

    So few rows at a time that no more than MAX_LOGITS logits of a model stand in memory.
    """
    batch, ended = sample(params, models.policy, tokenizer, rows, source)
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


# by several processes -----------------------------------------------------------------------------


def share_out(
    team: Team, params: PPOParams, rows: list[Row], answer: Callable[[list[Row], SharedLuck | None], Judged]
) -> Judged:
    """The judged answers to all rows, of which each process gives its share; every process has them all.

    What one process alone would give, but for rounding: a row is read with other neighbours.
    """
    if team.size == 1:
        return answer(rows, None)
    own = team.share(len(rows), params.group_size)
    # With fewer groups than processes some answer a group that counts for nothing: all take part in every exchange.
    asked = own or range(params.group_size)
    luck = SharedLuck(team, asked, len(rows), params.temperature)
    rollout, raw, figures = answer(rows[asked.start : asked.stop], luck)
    device = raw.device
    given = (_moved(rollout, "cpu"), raw.cpu(), figures) if own else None
    parts = [part for part in team.gather(given) if part is not None]
    weights = [len(part[1]) / len(rows) for part in parts]
    means = {name: sum(weight * part[2][name] for weight, part in zip(weights, parts, strict=True)) for name in figures}
    whole = _moved(_joined([part[0] for part in parts]), device)
    return whole, torch.cat([part[1] for part in parts]).to(device), means


def _joined(parts: Sequence[Rollout]) -> Rollout:
    """The rows of all parts, prompts widened on the left and responses on the right."""
    length = max(part.batch.prompt_length for part in parts)
    width = max(part.log_probs.shape[1] for part in parts)
    gaps = [(length - part.batch.prompt_length, width - part.log_probs.shape[1]) for part in parts]

    def widened(name: str) -> Tensor:
        columns = [(getattr(part.batch, name), gap) for part, gap in zip(parts, gaps, strict=True)]
        return torch.cat([pad(column, gap) for column, gap in columns])

    def responses(name: str) -> Tensor | None:
        columns = [(getattr(part, name), right) for part, (_, right) in zip(parts, gaps, strict=True)]
        return None if columns[0][0] is None else torch.cat([pad(column, (0, right)) for column, right in columns])

    batch = Batch(widened("tokens"), widened("attention"), length)
    names = [field.name for field in fields(Rollout) if field.name not in ("rows", "batch", "ended")]
    columns: dict[str, Any] = {name: responses(name) for name in names}
    rows = [row for part in parts for row in part.rows]
    return Rollout(rows, batch, torch.cat([part.ended for part in parts]), **columns)


def _moved(rollout: Rollout, device: Any) -> Rollout:
    batch = replace(rollout.batch, tokens=rollout.batch.tokens.to(device), attention=rollout.batch.attention.to(device))
    columns: dict[str, Any] = {
        field.name: column.to(device)
        for field in fields(Rollout)
        if isinstance(column := getattr(rollout, field.name), Tensor)
    }
    return replace(rollout, batch=batch, **columns)
