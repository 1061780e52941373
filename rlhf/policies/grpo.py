"""Group-relative policy optimisation and its losses: a thin layer over TRL's trainer."""

from __future__ import annotations

from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from rlhf.params import GRPOParams
from rlhf.policies import PolicyFiles, Run, Settings
from rlhf.policies.groups import GroupMethod, train_on_groups


def train_grpo(params: GRPOParams, files: PolicyFiles, run: Run) -> PreTrainedModel:
    """Advantages from groups of answers to one prompt, no critic. Source: Shao et al., arXiv 2402.03300."""
    return train_on_groups(params, files, run, GroupMethod(GRPOTrainer, configuration))


def configuration(params: GRPOParams, settings: Settings) -> GRPOConfig:
    """TRL's arguments."""
    return GRPOConfig(
        **settings,
        loss_type=params.loss,
        importance_sampling_level=params.importance_sampling_level,
        scale_rewards=params.scale_rewards,
    )
