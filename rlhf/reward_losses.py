"""The losses a reward model can be trained with on labels some of which are wrong.

Each takes a batch and returns the loss and the share of each label that it used, (B,), without gradient. d is the
margin by which the model agrees with a label, of a pair r(chosen) − r(rejected), and e the share of wrong labels;
docs/methods/selectiverm.md says when to use which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import softplus

from rlhf.params import TransportParams
from rlhf.selective import selective_loss

GCE_EXPONENT = 0.7
"""Between 0 (Bradley-Terry) and 1 (symmetric); the value of Zhang and Sabuncu (2018)."""


@dataclass(frozen=True)
class RewardBatch:
    """What an objective sees of one batch of B labels.

    `points` (B, D), `logits` (B,) and `labels` (B,) of 1 and -1 as for `selective_loss`; `mass`, the share of labels to
    use now; `noise_rate`; `doubt` (B,), log odds that a label is wrong by all others, at least 0; `believed` (B,),
    whether confident learning keeps it; `transport`, what plans are made of; `leads` (B,), what margins
    should be above; `peer_logits` (B,) of a second model, where the objective is among TWINS.
    """

    points: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    mass: float
    noise_rate: float
    doubt: torch.Tensor
    believed: torch.Tensor
    transport: TransportParams
    leads: torch.Tensor | None = None
    peer_logits: torch.Tensor | None = None

    @property
    def margins(self) -> torch.Tensor:
        """(B,) logits in favour of the label: of a pair, chosen minus rejected score."""
        return self.labels * self.logits


Losses = tuple[torch.Tensor, torch.Tensor]


def bradley_terry(batch: RewardBatch) -> Losses:
    """Mean of -log σ(d - lead): every label is believed. Source of the lead: Llama 2, section 3.2.2 (2023)."""
    return _mean(softplus(-batch.margins if batch.leads is None else batch.leads - batch.margins))


def label_smoothing(batch: RewardBatch) -> Losses:
    """Mean of -(1-e) log σ(d) - e log σ(-d). Source: conservative DPO, Mitchell (2023)."""
    margins, rate = batch.margins, batch.noise_rate
    return _mean((1 - rate) * softplus(-margins) + rate * softplus(margins))


def unbiased(batch: RewardBatch) -> Losses:
    """Mean of [-(1-e) log σ(d) + e log σ(-d)] / (1-2e): right on average, but without a lower bound.

    Source: Natarajan et al. (2013); as robust DPO, Chowdhury et al. (2024).
    """
    margins, rate = batch.margins, batch.noise_rate
    return _mean(((1 - rate) * softplus(-margins) - rate * softplus(margins)) / (1 - 2 * rate))


def symmetric(batch: RewardBatch) -> Losses:
    """Mean of σ(-d), the probability of the other label: a wrong label pulls no harder than a right one."""
    return _mean(torch.sigmoid(-batch.margins))


def gce(batch: RewardBatch) -> Losses:
    """Mean of (1 - σ(d)^q) / q, generalised cross entropy. Source: Zhang and Sabuncu (2018)."""
    # By the logarithm: the power of a sigmoid that has become 0 has no finite gradient.
    return _mean((1 - torch.exp(-GCE_EXPONENT * softplus(-batch.margins))) / GCE_EXPONENT)


def trimmed(batch: RewardBatch) -> Losses:
    """Mean of the smallest losses, as many as the mass says. Source: iterative trimming, Shen and Sanghavi (2019)."""
    losses = softplus(-batch.margins)
    kept = _smallest(losses, batch.mass)
    return (kept * losses).sum() / kept.sum(), kept


def co_teaching(batch: RewardBatch) -> Losses:
    """Two models, each trained on the labels on which the *other* loses least. Source: Han et al. (2018)."""
    if batch.peer_logits is None:
        raise ValueError("co_teaching needs the logits of a second model; pass peer_logits")
    own, peer = softplus(-batch.margins), softplus(-batch.labels * batch.peer_logits)
    for_own, for_peer = _smallest(peer, batch.mass), _smallest(own, batch.mass)
    return ((for_own * own).sum() + (for_peer * peer).sum()) / for_own.sum(), for_own


def cleanlab(batch: RewardBatch) -> Losses:
    """Bradley-Terry without the labels that confident learning finds wrong. Source: Northcutt et al. (2021)."""
    kept = batch.believed.to(batch.margins.dtype)
    return (kept * softplus(-batch.margins)).sum() / kept.sum().clamp_min(1), kept


def full_transport(batch: RewardBatch) -> Losses:
    """The selective loss that may leave out nothing: what transport does without selection."""
    return selective_plain(replace(batch, mass=1.0))


def selective_plain(batch: RewardBatch) -> Losses:
    """Labels that contradict the predictions nearby are left out; the published idea alone."""
    return selective_loss(batch.points, batch.logits, batch.labels, batch.mass, batch.transport)


def selective(batch: RewardBatch) -> Losses:
    """The same, and a label that all others speak against is dear."""
    return selective_loss(batch.points, batch.logits, batch.labels, batch.mass, batch.transport, batch.doubt)


OBJECTIVES: dict[str, Callable[[RewardBatch], Losses]] = {
    function.__name__: function
    for function in (
        bradley_terry,
        label_smoothing,
        unbiased,
        symmetric,
        gce,
        trimmed,
        co_teaching,
        cleanlab,
        full_transport,
        selective_plain,
        selective,
    )
}


TWINS = ("co_teaching",)
"""Objectives that train a second model beside the first."""


def _smallest(losses: torch.Tensor, mass: float) -> torch.Tensor:
    """(B,): 1 for the share `mass` of smallest losses, at least one, else 0."""
    kept = losses.detach().topk(max(1, round(mass * len(losses))), largest=False).indices
    return torch.zeros_like(losses).index_fill(0, kept, 1.0)


def _mean(losses: torch.Tensor) -> Losses:
    return losses.mean(), torch.ones_like(losses)
