"""Group-relative policy optimisation and its losses: a thin layer over TRL's trainer, with dynamic sampling."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from rlhf.errors import UserError
from rlhf.params import GRPOParams
from rlhf.policies import PolicyFiles, Run, Settings
from rlhf.policies.groups import EqualGroupsCounted, GroupMethod, train_on_groups
from rlhf.policies.refills import exchange, further_prompts, refill_figures, replace_rows, warn_of_no_signal


def train_grpo(params: GRPOParams, files: PolicyFiles, run: Run) -> PreTrainedModel:
    """Advantages from groups of answers to one prompt, no critic. Source: Shao et al., arXiv 2402.03300."""
    return train_on_groups(params, files, run, GroupMethod(RefillingTrainer, configuration))


def configuration(params: GRPOParams, settings: Settings) -> RefillingConfig:
    """TRL's arguments. Raises UserError where a process would hold parts of groups and has to replace whole ones."""
    answers = settings["per_device_train_batch_size"] * params.gradient_accumulation_steps
    if params.dynamic_sampling and answers % params.group_size:
        raise UserError(
            f"each of {os.environ.get('WORLD_SIZE', '1')} processes samples {answers} answers at a time, no multiple "
            f"of group_size {params.group_size}; dynamic_sampling needs whole groups: raise batch_size"
        )
    return RefillingConfig(
        **settings,
        loss_type=params.loss,
        importance_sampling_level=params.importance_sampling_level,
        scale_rewards=params.scale_rewards,
        max_refills=params.dynamic_sampling.max_refills if params.dynamic_sampling else 0,
    )


@dataclass
class RefillingConfig(GRPOConfig):
    """TRL's arguments, and how often a batch may be refilled."""

    max_refills: int = field(default=0)


class RefillingTrainer(EqualGroupsCounted, GRPOTrainer):
    """TRL's trainer, whose equal groups make room for those of further prompts before anything is learnt.

    All processes see the rewards of all groups and refill as often as the neediest of them. Without refills it only
    counts equal groups.
    """

    args: RefillingConfig

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        processes, own, size = self.accelerator.num_processes, self.accelerator.process_index, self.num_generations
        noted = {name: len(values) for name, values in self._metrics["train"].items()}
        batch, equal = self._sampled(inputs)
        answers = [equal.numel() * size]
        if self.args.max_refills:
            equal = equal.view(processes, -1)
        while equal.any() and len(answers) <= self.args.max_refills:
            groups = int(equal.sum(1).max())
            place = self.state.global_step, len(answers)
            prompts = further_prompts(cast(Any, self.train_dataset), self.args.seed, *place, groups * processes)
            mine = prompts[own * groups : (own + 1) * groups]
            fresh, fresh_equal = self._sampled([row for row in mine for _ in range(size)])
            fresh_equal = fresh_equal.view(processes, -1)
            answers.append(fresh_equal.numel() * size)
            for process in range(processes):
                targets, sources = exchange(equal[process], fresh_equal[process], size)
                equal[process, targets // size] = False
                if process == own:
                    batch = {name: _replaced(name, old, targets, fresh[name], sources) for name, old in batch.items()}
        batch["num_items_in_batch"] = cast(Tensor, self.accelerator.gather(batch["completion_mask"].sum())).sum()
        self._note(noted, answers, equal)
        return batch

    def _sampled(self, inputs: list[dict[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        """TRL's batch, and which groups of all processes have equal rewards: (groups,)."""
        return super()._generate_and_score_completions(inputs), self.equal_groups()

    def _note(self, noted: dict[str, int], answers: list[int], equal: Tensor) -> None:
        """Bring TRL's figures of the step's samplings to means over all answers, and add those of the refills."""
        metrics, total = self._metrics["train"], sum(answers)
        for name, values in metrics.items():
            latest = values[noted.get(name, 0) :]
            if len(latest) == len(answers) > 1:
                mean = sum(value * count for value, count in zip(latest, answers, strict=True)) / total
                values[-len(latest) :] = [mean]
        metrics["frac_reward_zero_std"][-1] = equal.float().mean().item()
        if self.args.max_refills:
            for name, value in refill_figures(total, answers[0], len(answers) - 1).items():
                metrics[name].append(value)
            warn_of_no_signal(equal.flatten())


def _replaced(name: str, old: Tensor, targets: Tensor, fresh: Tensor, sources: Tensor) -> Tensor:
    if old.ndim == 0:
        return old
    return replace_rows(old, targets, fresh, sources, left=name.startswith("prompt"))
