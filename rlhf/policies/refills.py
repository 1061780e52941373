"""Dynamic sampling: groups whose rewards are all equal make room for groups of further prompts.

Source: Yu et al., DAPO, arXiv 2503.14476, section 3.2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.data.formats import Row
from rlhf.params import PPOParams
from rlhf.policies.actors import Batch
from rlhf.policies.objectives import equal_groups
from rlhf.policies.rollout import Judged, Rollout

logger = logging.getLogger(__name__)


def further_prompts(rows: Sequence[Row], seed: int, step: int, refill: int, groups: int) -> list[Row]:
    """`groups` prompts in an order that follows from the seed, the step and the number of its refill alone.

    Nothing has to be remembered for it, so that a training which was stopped draws the same ones again. A prompt that
    the step has already asked may come once more.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003 * step + 15_485_863 * refill)
    order: list[int] = []
    while len(order) < groups:
        order += torch.randperm(len(rows), generator=generator).tolist()
    return [rows[index] for index in order[:groups]]


def refilled(
    params: PPOParams, first: Judged, sample: Callable[[list[Row]], Judged], more: Callable[[int, int], list[Row]]
) -> Judged:
    """The batch `first` with its equal groups replaced, while there are some and `max_refills` allows.

    `sample` answers and judges rows, `more(refill, groups)` gives prompts. Groups still equal at the limit stay in the
    batch: their advantages are 0. The figures are means over all answers, those of dropped groups too.
    """
    rollout, raw, figures = first
    size, limit = params.group_size, params.dynamic_sampling.max_refills if params.dynamic_sampling else 0
    drawn, refills = len(raw), 0
    while refills < limit and (equal := _without_signal(params, rollout, raw)).any():
        refills += 1
        prompts = more(refills, int(equal.sum()))
        fresh, fresh_raw, fresh_figures = sample([row for row in prompts for _ in range(size)])
        targets, sources = exchange(equal, _without_signal(params, fresh, fresh_raw), size)
        rollout = _replace_answers(rollout, targets, fresh, sources)
        raw = replace_rows(raw, targets, fresh_raw, sources)
        share = len(fresh_raw) / (drawn + len(fresh_raw))
        figures = {name: (1 - share) * value + share * fresh_figures[name] for name, value in figures.items()}
        drawn += len(fresh_raw)
    warn_of_no_signal(_without_signal(params, rollout, raw))
    return rollout, raw, figures | refill_figures(drawn, len(raw), refills)


def exchange(equal: Tensor, fresh_equal: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The rows of equal groups that can be replaced, and of the fresh groups that replace them; `size` rows each."""
    targets, sources = equal.nonzero(), (~fresh_equal).nonzero()
    count = min(len(targets), len(sources))
    members = torch.arange(size, device=equal.device)
    return (targets[:count] * size + members).flatten(), (sources[:count] * size + members).flatten()


def replace_rows(old: Tensor, targets: Tensor, fresh: Tensor, sources: Tensor, left: bool = False) -> Tensor:
    """`old` with rows of `fresh` in the place of some; the narrower of the two is widened by zeros first."""
    if old.ndim > 1:
        width = max(old.shape[1], fresh.shape[1])
        old, fresh = _widened(old, width, left), _widened(fresh, width, left)
    return old.index_copy(0, targets, fresh[sources])


def _widened(rows: Tensor, width: int, left: bool) -> Tensor:
    gap = width - rows.shape[1]
    return pad(rows, (gap, 0) if left else (0, gap))


def refill_figures(drawn: int, kept: int, refills: int) -> dict[str, float]:
    """How many times a step was refilled, and which share of all sampled answers stands in no batch."""
    return {"groups/dropped": (drawn - kept) / drawn, "groups/refills": float(refills)}


def warn_of_no_signal(equal: Tensor) -> None:
    if equal.all():
        logger.warning(
            "all %d groups of a step have equal rewards, refills too: nothing is learnt from it; take prompts of "
            "middling difficulty, raise group_size, temperature or max_refills, or add a finer reward",
            len(equal),
        )


def _without_signal(params: PPOParams, rollout: Rollout, raw: Tensor) -> Tensor:
    """Which groups the advantage sees as equal: (groups,); a missing end counts as in the scores."""
    return equal_groups(raw - params.missing_eos_penalty * (~rollout.ended).float(), params.group_size)


def _replace_answers(rollout: Rollout, targets: Tensor, fresh: Rollout, sources: Tensor) -> Rollout:
    rows = list(rollout.rows)
    for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
        rows[target] = fresh.rows[source]
    columns: dict[str, Any] = {
        field.name: replace_rows(old, targets, getattr(fresh, field.name), sources)
        for field in fields(Rollout)
        if isinstance(old := getattr(rollout, field.name), Tensor)
    }
    return replace(rollout, rows=rows, batch=_replace_tokens(rollout.batch, targets, fresh.batch, sources), **columns)


def _replace_tokens(batch: Batch, targets: Tensor, fresh: Batch, sources: Tensor) -> Batch:
    """Prompts grow on the left and responses on the right; what is added counts as padding."""
    columns = []
    for name in ("tokens", "attention"):
        old, new = getattr(batch, name), getattr(fresh, name)
        prompts = replace_rows(
            old[:, : batch.prompt_length], targets, new[:, : fresh.prompt_length], sources, left=True
        )
        responses = replace_rows(old[:, batch.prompt_length :], targets, new[:, fresh.prompt_length :], sources)
        columns.append(torch.cat([prompts, responses], 1))
    return Batch(*columns, prompt_length=max(batch.prompt_length, fresh.prompt_length))
