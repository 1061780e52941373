"""REINFORCE with a leave-one-out baseline: a thin layer over TRL's trainer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from trl import RLOOConfig, RLOOTrainer

from rlhf.params import RLOOParams
from rlhf.policies import PolicyFiles, Run, Settings
from rlhf.policies.groups import EqualGroupsCounted, GroupMethod, train_on_groups


def train_rloo(params: RLOOParams, files: PolicyFiles, run: Run) -> PreTrainedModel:
    """Each answer against the mean of its group's others. Source: Ahmadian et al., arXiv 2402.14740."""
    return train_on_groups(params, files, run, GroupMethod(CountingTrainer, configuration))


def configuration(params: RLOOParams, settings: Settings) -> RLOOConfig:
    """TRL's arguments."""
    return RLOOConfig(**settings, normalize_advantages=params.whiten_advantages)


class CountingTrainer(EqualGroupsCounted, RLOOTrainer):
    """TRL's trainer, which counts the groups with equal rewards, from which there is nothing to learn."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self._metrics["train"]["frac_reward_zero_std"][-1] = self.equal_groups().float().mean().item()
        return batch
