"""REINFORCE with a leave-one-out baseline: a thin layer over TRL's trainer."""

from __future__ import annotations

from transformers import PreTrainedModel
from trl import RLOOConfig, RLOOTrainer

from rlhf.params import RLOOParams
from rlhf.policies import PolicyFiles, Run, Settings
from rlhf.policies.groups import GroupMethod, train_on_groups


def train_rloo(params: RLOOParams, files: PolicyFiles, run: Run) -> PreTrainedModel:
    """Each answer against the mean of its group's others. Source: Ahmadian et al., arXiv 2402.14740."""
    return train_on_groups(params, files, run, GroupMethod(RLOOTrainer, configuration))


def configuration(params: RLOOParams, settings: Settings) -> RLOOConfig:
    """TRL's arguments."""
    return RLOOConfig(**settings, normalize_advantages=params.whiten_advantages)
