"""The gradient steps of one rollout: several epochs of minibatches, stopped where the policy has gone far enough."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import get_scheduler

from rlhf.params import PPOParams
from rlhf.policies.actors import Batch, Models
from rlhf.policies.advantages import Experience
from rlhf.policies.objectives import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    exact_kl,
    kl_estimate,
    masked_mean,
    token_log_probs,
)
from rlhf.policies.rollout import Rollout


class Optimiser:
    """AdamW over policy and critic, each with its own learning rate."""

    def __init__(self, params: PPOParams, models: Models) -> None:
        self.params = params
        self.models = models
        self.trained = {name: list(values.values()) for name, values in models.trained().items()}
        rates = {"policy": params.learning_rate, "critic": params.critic_learning_rate}
        self.adam = torch.optim.AdamW(
            [{"params": group, "lr": rates[name]} for name, group in self.trained.items()],
            weight_decay=params.weight_decay,
            eps=1e-8,
        )
        self.updates = params.update_epochs * params.minibatches
        total = params.steps * self.updates
        self.schedule = get_scheduler(params.lr_scheduler, self.adam, round(params.warmup_share * total), total)

    def update(self, rollout: Rollout, experience: Experience, beta: float) -> dict[str, float]:
        """Take the gradient steps of one rollout; returns the mean of each figure over them.

        A minibatch on which the policy lies further than `target_kl` from the one that sampled is the last and takes
        no step; the learning rate goes on as if all had been taken.
        """
        limit = self.params.target_kl
        history: list[dict[str, float]] = []
        taken = 0
        for index in self._minibatches(rollout):
            history.append(self._gradient(rollout, experience, index, beta))
            if limit is not None and history[-1]["policy/approxkl_avg"] > limit:
                break
            history[-1] |= self._step()
            taken += 1
        self.adam.zero_grad()
        for _ in range(self.updates - taken):
            self.schedule.step()
        figures = {name: _mean([row[name] for row in history if name in row]) for name in history[0]}
        return figures if limit is None else figures | {"policy/updates": float(taken)}

    def _minibatches(self, rollout: Rollout) -> list[Tensor]:
        rows, device = len(rollout.rows), rollout.log_probs.device
        size = rows // self.params.minibatches
        epochs = range(self.params.update_epochs)
        return [index for _ in epochs for index in torch.randperm(rows).to(device).split(size)]

    def _gradient(self, rollout: Rollout, experience: Experience, index: Tensor, beta: float) -> dict[str, float]:
        """The gradient of one minibatch, in `gradient_accumulation_steps` parts; returns its figures."""
        self.adam.zero_grad()
        tokens = experience.mask[index].sum().clamp_min(1)
        figures: dict[str, float] = {}
        for part in index.chunk(self.params.gradient_accumulation_steps):
            # Parts weigh by their tokens, so that any number of them gives the minibatch's own gradient.
            share = experience.mask[part].sum() / tokens
            loss, part_figures = self._loss(rollout, experience, part, beta)
            (loss * share).backward()
            for name, value in part_figures.items():
                figures[name] = figures.get(name, 0.0) + value * share.item()
        return figures

    def _step(self) -> dict[str, float]:
        norms = {
            f"{name}/grad_norm": torch.nn.utils.clip_grad_norm_(group, self.params.max_grad_norm).item()
            for name, group in self.trained.items()
        }
        self.adam.step()
        self.schedule.step()
        return norms

    def _loss(
        self, rollout: Rollout, experience: Experience, part: Tensor, beta: float
    ) -> tuple[Tensor, dict[str, float]]:
        params = self.params
        batch = rollout.batch.rows(part)
        width = batch.responses.shape[1]
        mask, advantages = experience.mask[part, :width], experience.advantages[part, :width]

        logits, values = self.models.read(batch)
        log_probs = token_log_probs(logits, batch.responses, params.temperature)
        log_ratio = (log_probs - rollout.log_probs[part, :width]) * mask
        clip = (params.clip_range, params.clip_range if params.clip_range_high is None else params.clip_range_high)
        policy_loss = clipped_policy_loss(log_ratio, advantages, mask, clip, params.dual_clip)
        figures = {"loss/policy_avg": policy_loss.item(), **_distance(log_ratio.detach(), mask, clip)}
        loss = policy_loss
        if values is not None and rollout.values is not None and experience.returns is not None:
            old_values, returns = rollout.values[part, :width], experience.returns[part, :width]
            value_loss = clipped_value_loss(values, old_values, returns, mask, params.value_clip_range)
            figures["loss/value_avg"] = value_loss.item()
            loss = loss + params.value_coefficient * value_loss
        if params.entropy_coefficient:
            loss = loss - params.entropy_coefficient * masked_mean(entropy(logits, params.temperature), mask)
        if params.kl_in == "loss" and beta:
            references = rollout.reference_log_probs[part, :width]
            kl = masked_mean(self._kl(batch, logits, log_probs * mask, references * mask), mask)
            figures["loss/kl_avg"] = kl.item()
            loss = loss + beta * kl
        return loss, figures

    def _kl(self, batch: Batch, logits: Tensor, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        """KL(π ‖ π_ref) per token with the policy's gradient; `full` asks the reference again for its logits.

        The log-probabilities come masked: what k3 makes of padding could be infinite.
        """
        if self.params.kl_estimator != "full":
            return kl_estimate(log_probs, reference_log_probs, self.params.kl_estimator)
        with torch.no_grad():
            reference_logits = self.models.reference_logits(batch)
        return exact_kl(logits, reference_logits, self.params.temperature)


def _distance(log_ratio: Tensor, mask: Tensor, clip: tuple[float, float]) -> dict[str, float]:
    """How far the policy lies from the one that sampled, and on which share of tokens the clip bites."""
    change = log_ratio.exp() - 1
    clipped = (change > clip[1]) | (change < -clip[0])
    return {
        "policy/approxkl_avg": 0.5 * masked_mean(log_ratio.square(), mask).item(),
        "policy/clipfrac_avg": masked_mean(clipped.float(), mask).item(),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
