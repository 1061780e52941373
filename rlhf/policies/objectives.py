"""The mathematics of policy gradients as pure functions of tensors; masks are 1 on response tokens, 0 elsewhere.

Symbols: log π is the policy's log-probability of a sampled token, ρ the ratio π/π_old, r a reward, V a value, A an
advantage. All tensors are (batch, tokens) unless stated.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOGITS = 2**24
"""At most so many logits stand in one batch that is only read: 64 MiB in float32, whatever batch and vocabulary."""

EQUAL = 1e-8
"""Scores that differ by less say nothing about each other."""

# means --------------------------------------------------------------------------------------------


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over tokens whose mask is 1; zero where there are none."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Values at mean 0 and standard deviation 1 over the masked tokens; zero elsewhere."""
    centred = values - masked_mean(values, mask)
    variance = masked_mean(centred.square(), mask)
    return centred * torch.rsqrt(variance + 1e-8) * mask


# distributions ------------------------------------------------------------------------------------


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """The log π of `tokens` under `logits` (batch, tokens, vocabulary) that were sampled at `temperature`."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """The entropy in nats of each next-token distribution, from `logits` (batch, tokens, vocabulary)."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def exact_kl(logits: Tensor, reference_logits: Tensor, temperature: float) -> Tensor:
    """KL(π ‖ π_ref) in nats of each next-token distribution, summed over the vocabulary; logits as in `entropy`."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    reference_log_probs = (reference_logits.float() / temperature).log_softmax(-1)
    return (log_probs.exp() * (log_probs - reference_log_probs)).sum(-1)


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) in nats from tokens that π sampled.

    With d = log π − log π_ref: `k1` is d (unbiased, can be negative), `k2` is d²/2 (biased, low variance), `k3` is
    exp(−d) − 1 + d (unbiased, never negative). Source: J. Schulman, "Approximating KL Divergence", 2020.
    """
    difference = log_probs - reference_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.exp(-difference) - 1 + difference


# rewards ------------------------------------------------------------------------------------------


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """−β·KL on every response token, plus the answer's score (batch,) on its last one."""
    rewards = -beta * kl * mask
    last = mask.sum(1).long().clamp_min(1) - 1
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def adapted_beta(beta: float, kl: float, target: float, share: float) -> float:
    """β · (1 + clip(KL/target − 1, ±0.2) · share), KL and target in nats per answer.

    `share` is the answers seen since the last change over the horizon. Source: Ziegler et al., arXiv 1909.08593, 2.2.
    """
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * share)


# advantages ---------------------------------------------------------------------------------------


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} − V_t; the value after the last response token is 0.

    Responses start at column 0 and are padded on the right. Source: Schulman et al., arXiv 1506.02438, eq. 16.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * gae_lambda * following) * mask[:, t]
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages


def group_advantages(returns: Tensor, size: int) -> Tensor:
    """(R − mean)/(std + 10⁻⁴) over each `size` answers in a row: (batch,). Source: Shao et al., arXiv 2402.03300.

    The deviation is that of a sample (n − 1), and the 10⁻⁴ is TRL's.
    """
    groups = returns.view(-1, size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def leave_one_out_advantages(returns: Tensor, size: int) -> Tensor:
    """R minus the mean of the group's other answers: (batch,). Source: Ahmadian et al., arXiv 2402.14740."""
    return centred_advantages(returns, size) * size / (size - 1)


def centred_advantages(returns: Tensor, size: int) -> Tensor:
    """R minus the mean of each `size` answers in a row: (batch,)."""
    groups = returns.view(-1, size)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def equal_groups(scores: Tensor, size: int) -> Tensor:
    """Which of the groups of `size` answers in a row have equal scores: (groups,) booleans."""
    groups = scores.view(-1, size)
    return groups.amax(1) - groups.amin(1) < EQUAL


# losses -------------------------------------------------------------------------------------------


def clipped_policy_loss(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, clip: tuple[float, float], dual_clip: float | None
) -> Tensor:
    """−min(ρA, clip(ρ, 1 − ε, 1 + ε_high)A), meant over response tokens. Schulman et al., arXiv 1707.06347, eq. 7.

    `clip` is (ε, ε_high). `dual_clip` c keeps the term of a negative advantage above cA, however large ρ is (Ye et al.,
    arXiv 1912.09729). The log-ratio is masked before it is exponentiated: padding may hold anything.
    """
    ratio = torch.exp(log_ratio * mask)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -masked_mean(gain, mask)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """½ max((V − G)², (V_clipped − G)²), meant over response tokens; V_clipped stays within `clip` of the old V."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - returns).square(), (near - returns).square())
    return 0.5 * masked_mean(worse, mask)
