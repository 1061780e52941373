"""The gradient steps of one rollout: several epochs of minibatches, stopped where the policy has gone far enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from rlhf.team import Team

Figures = dict[str, Tensor]
"""Numbers on the device: asking for their value would make it wait."""

ALONE = Team()


@dataclass
class Part:
    """Some rows of a rollout and of what is learnt from them, as wide as the longest of their answers."""

    batch: Batch
    mask: Tensor
    advantages: Tensor
    log_probs: Tensor
    reference_log_probs: Tensor
    returns: Tensor | None
    values: Tensor | None

    @classmethod
    def cut(cls, rollout: Rollout, experience: Experience, rows: Tensor) -> Part:
        batch = rollout.batch.rows(rows)
        width = batch.responses.shape[1]
        columns = (experience.mask, experience.advantages, rollout.log_probs, rollout.reference_log_probs)
        known = [None if column is None else column[rows, :width] for column in (experience.returns, rollout.values)]
        return cls(batch, *(column[rows, :width] for column in columns), *known)


class Optimiser:
    """AdamW over policy and critic, each with its own learning rate."""

    def __init__(self, params: PPOParams, models: Models, team: Team = ALONE) -> None:
        self.params = params
        self.models = models
        self.team = team
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
        history: list[Figures] = []
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
        names = dict.fromkeys(name for row in history for name in row)
        figures = {name: torch.stack([row[name] for row in history if name in row]).mean().item() for name in names}
        return figures if limit is None else figures | {"policy/updates": float(taken)}

    def _minibatches(self, rollout: Rollout) -> list[Tensor]:
        rows, device = len(rollout.rows), rollout.log_probs.device
        size = rows // self.params.minibatches
        epochs = range(self.params.update_epochs)
        return [index for _ in epochs for index in torch.randperm(rows).to(device).split(size)]

    def _gradient(self, rollout: Rollout, experience: Experience, index: Tensor, beta: float) -> Figures:
        """The gradient of one minibatch, in `gradient_accumulation_steps` parts; returns its figures.

        Of several processes each reads its rows; gradients and figures are then summed over all of them.
        """
        self.adam.zero_grad()
        tokens = experience.mask[index].sum().clamp_min(1)
        own = self.team.share(len(index))
        figures: Figures = {}
        for rows in self._parts(rollout, index[own.start : own.stop]):
            part = Part.cut(rollout, experience, rows)
            # Parts weigh by their tokens, so that any number of them gives the minibatch's own gradient.
            share = part.mask.sum() / tokens
            for name, value in self._backward(part, beta, share).items():
                figures[name] = figures.get(name, 0.0) + value * share
        gradients = [weight.grad for group in self.trained.values() for weight in group if weight.grad is not None]
        self.team.add_up([*gradients, *figures.values()])
        return figures

    def _parts(self, rollout: Rollout, index: Tensor) -> Sequence[Tensor]:
        """A minibatch's rows in `gradient_accumulation_steps` parts of answers of similar length: little padding."""
        count = self.params.gradient_accumulation_steps
        lengths = rollout.batch.attention[index].sum(1)
        return [index] if count == 1 else index[lengths.argsort(stable=True)].chunk(count)

    def _backward(self, part: Part, beta: float, share: Tensor) -> Figures:
        """Add the gradients of a part's losses; of two passes the second begins when the first has left the memory."""
        if self.models.one_pass:
            logits, values = self.models.read(part.batch)
            loss, figures = self._policy_loss(part, logits, beta)
            if values is not None:
                value_loss, value_figures = self._value_loss(part, values)
                loss, figures = loss + value_loss, figures | value_figures
            (loss * share).backward()
            return figures
        policy_loss, figures = self._policy_loss(part, self.models.logits(part.batch), beta)
        (policy_loss * share).backward()
        value_loss, value_figures = self._value_loss(part, self.models.values(part.batch))
        (value_loss * share).backward()
        return figures | value_figures

    def _step(self) -> Figures:
        norms = {
            f"{name}/grad_norm": torch.nn.utils.clip_grad_norm_(group, self.params.max_grad_norm)
            for name, group in self.trained.items()
        }
        self.adam.step()
        self.schedule.step()
        return norms

    def _policy_loss(self, part: Part, logits: Tensor, beta: float) -> tuple[Tensor, Figures]:
        params, mask = self.params, part.mask
        log_probs = token_log_probs(logits, part.batch.responses, params.temperature)
        log_ratio = (log_probs - part.log_probs) * mask
        clip = (params.clip_range, params.clip_range if params.clip_range_high is None else params.clip_range_high)
        loss = clipped_policy_loss(log_ratio, part.advantages, mask, clip, params.dual_clip)
        figures = {"loss/policy_avg": loss.detach(), **_distance(log_ratio.detach(), mask, clip)}
        if params.entropy_coefficient:
            loss = loss - params.entropy_coefficient * masked_mean(entropy(logits, params.temperature), mask)
        if params.kl_in == "loss" and beta:
            kl = masked_mean(self._kl(part.batch, logits, log_probs * mask, part.reference_log_probs * mask), mask)
            figures["loss/kl_avg"] = kl.detach()
            loss = loss + beta * kl
        return loss, figures

    def _value_loss(self, part: Part, values: Tensor | None) -> tuple[Tensor, Figures]:
        assert values is not None and part.values is not None and part.returns is not None
        loss = clipped_value_loss(values, part.values, part.returns, part.mask, self.params.value_clip_range)
        return self.params.value_coefficient * loss, {"loss/value_avg": loss.detach()}

    def _kl(self, batch: Batch, logits: Tensor, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        """KL(π ‖ π_ref) per token with the policy's gradient; `full` asks the reference again for its logits.

        The log-probabilities come masked: what k3 makes of padding could be infinite.
        """
        if self.params.kl_estimator != "full":
            return kl_estimate(log_probs, reference_log_probs, self.params.kl_estimator)
        with torch.no_grad():
            reference_logits = self.models.reference_logits(batch)
        return exact_kl(logits, reference_logits, self.params.temperature)


def _distance(log_ratio: Tensor, mask: Tensor, clip: tuple[float, float]) -> Figures:
    """How far the policy lies from the one that sampled, and on which share of tokens the clip bites."""
    change = log_ratio.exp() - 1
    clipped = (change > clip[1]) | (change < -clip[0])
    return {
        "policy/approxkl_avg": 0.5 * masked_mean(log_ratio.square(), mask),
        "policy/clipfrac_avg": masked_mean(clipped.float(), mask),
    }
