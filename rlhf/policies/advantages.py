"""From what rewards say of answers to what each token did for them: scores, the leash, advantages and returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.params import PPOParams
from rlhf.policies.objectives import (
    EQUAL,
    adapted_beta,
    centred_advantages,
    equal_groups,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    masked_mean,
    token_rewards,
    whiten,
)
from rlhf.policies.rollout import Rollout

BY_GROUP = {
    "group": group_advantages,
    "leave_one_out": leave_one_out_advantages,
    "likelihood": centred_advantages,
}
"""Advantages that compare an answer with its group."""


@dataclass
class Adaptive:
    """What changes with the rollouts beside the weights: β, and count, mean and squares of all scores so far."""

    beta: float
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def see(self, scores: Tensor) -> None:
        """Take a batch into the running moments. Source: Chan et al. 1979, the update by batches."""
        new, total = len(scores), self.count + len(scores)
        shift = scores.mean().item() - self.mean
        self.squares += (scores - scores.mean()).square().sum().item() + shift**2 * self.count * new / total
        self.mean += shift * new / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The standard deviation of all scores so far, 1 where they are all equal."""
        deviation = (self.squares / max(1, self.count)) ** 0.5
        return deviation if deviation > EQUAL else 1.0

    def follow(self, params: PPOParams, kl: float) -> dict[str, float]:
        """Move β so that the KL, in nats per answer, comes to its target; returns the β that was in force."""
        if params.adaptive_beta is None:
            return {}
        before, share = self.beta, params.batch_size / params.adaptive_beta.horizon
        self.beta = adapted_beta(before, kl, params.adaptive_beta.target, share)
        return {"objective/beta": before}


@dataclass
class Experience:
    """Advantages, and with a critic returns, per response token; `scores` per answer; `mask` is 1 on what is learnt."""

    advantages: Tensor
    returns: Tensor | None
    scores: Tensor
    mask: Tensor


def settle_scores(params: PPOParams, raw: Tensor, ended: Tensor, adaptive: Adaptive) -> Tensor:
    """The scores (batch,) that are learnt from: scaled, then clipped, then an unended answer penalised."""
    scores = raw
    if params.score_scaling == "whiten":
        scores = whiten(raw, torch.ones_like(raw))
    elif params.score_scaling == "running":
        adaptive.see(raw)
        scores = raw / adaptive.deviation
    if params.score_clip is not None:
        scores = scores.clamp(-params.score_clip, params.score_clip)
    return scores - params.missing_eos_penalty * (~ended).float()


def estimate(params: PPOParams, rollout: Rollout, scores: Tensor, beta: float) -> Experience:
    """Rewards per token, with the leash where it belongs to them, and the advantages asked for.

    With `likelihood` the score is not learnt from: in its place stands the answer's own log-probability in nats.
    """
    mask = rollout.batch.mask
    aims = (rollout.log_probs * mask).sum(1) if params.advantage == "likelihood" else scores
    rewards = token_rewards(aims, rollout.kl, mask, beta if params.kl_in == "reward" else 0.0)
    advantages = _advantages(params, rollout, rewards)
    returns = None if rollout.values is None else advantages + rollout.values * mask
    if params.mask_truncated:
        mask = mask * rollout.ended.unsqueeze(1)
    if params.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(advantages, returns, scores, mask)


def _advantages(params: PPOParams, rollout: Rollout, rewards: Tensor) -> Tensor:
    mask = rollout.batch.mask
    if params.advantage in BY_GROUP:
        return BY_GROUP[params.advantage](rewards.sum(1), params.group_size).unsqueeze(1) * mask
    if rollout.values is not None:
        return generalised_advantages(rewards, rollout.values, mask, params.gamma, params.gae_lambda)
    # Without values and with λ = 1 what is left is the discounted reward to go.
    return generalised_advantages(rewards, torch.zeros_like(rewards), mask, params.gamma, 1.0)


def describe(params: PPOParams, rollout: Rollout, experience: Experience) -> dict[str, float]:
    """The rollout's figures, under TRL's names where it has one."""
    mask = rollout.batch.mask
    difference = rollout.log_probs - rollout.reference_log_probs
    figures = {
        "objective/scores": experience.scores.mean().item(),
        "objective/kl": (difference * mask).sum(1).mean().item(),
        "objective/entropy": masked_mean(rollout.entropy, mask).item(),
        "completions/mean_length": mask.sum(1).mean().item(),
        "completions/stop_rate": rollout.ended.float().mean().item(),
    }
    if rollout.values is not None and experience.returns is not None:
        error = masked_mean((experience.returns - rollout.values).square(), mask)
        centred = experience.returns - masked_mean(experience.returns, mask)
        spread = masked_mean(centred.square(), mask).clamp_min(1e-8)
        figures["critic/explained_variance"] = 1 - (error / spread).item()
    if params.group_size > 1:
        figures["frac_reward_zero_std"] = equal_groups(experience.scores, params.group_size).float().mean().item()
    return figures
