"""Policy optimisation: PPO of our own, DPO and GRPO over TRL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.checkpoints import Checkpoints
from rlhf.curves import Log
from rlhf.params import DPOParams, GRPOParams, PPOParams


@dataclass(frozen=True)
class PolicyFiles:
    """What a policy is trained from: the SFT model, the reward model, rows of prompts and of preferences."""

    sft: Path
    reward: Path
    prompts: Path
    preferences: Path


def train_policy(
    params: PPOParams | DPOParams | GRPOParams,
    files: PolicyFiles,
    seed: int,
    log: Log,
    checkpoints: Checkpoints | None = None,
) -> Any:
    """Train by the algorithm that `params` names; returns the model, adapters merged, in evaluation mode.

    The model on disk in `files.sft` is the reference and stays as it is. PPO goes on from `checkpoints` where it was
    stopped.
    """
    # Imported here: TRL takes seconds, and a run needs one algorithm.
    if isinstance(params, PPOParams):
        from rlhf.policies.ppo import train_ppo

        return train_ppo(params, files, seed, log, checkpoints)
    if isinstance(params, DPOParams):
        from rlhf.policies.dpo import train_dpo

        return train_dpo(params, files, seed, log)
    from rlhf.policies.grpo import train_grpo

    return train_grpo(params, files, seed, log)
