"""REINFORCE with a leave-one-out baseline: a thin layer over TRL's trainer."""

from __future__ import annotations

from transformers import PreTrainedModel
from trl import RLOOConfig, RLOOTrainer

from rlhf.checkpoints import Checkpoints
from rlhf.curves import Log
from rlhf.params import RLOOParams
from rlhf.policies import PolicyFiles, Settings
from rlhf.policies.groups import GroupMethod, train_on_groups


def train_rloo(
    params: RLOOParams, files: PolicyFiles, seed: int, log: Log, checkpoints: Checkpoints | None = None
) -> PreTrainedModel:
    """Each answer against the mean of its group's others. Source: Ahmadian et al., arXiv 2402.14740."""
    return train_on_groups(params, files, seed, log, GroupMethod(RLOOTrainer, configuration), checkpoints)


def configuration(params: RLOOParams, settings: Settings) -> RLOOConfig:
    """TRL's arguments."""
    return RLOOConfig(**settings, normalize_advantages=params.whiten_advantages)
