"""Policy optimisation: PPO of our own; DPO, also in rounds, KTO, ORPO, CPO, GRPO and RLOO over TRL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.checkpoints import Checkpoints
from rlhf.curves import Log
from rlhf.params import (
    CPOParams,
    DPOParams,
    GRPOParams,
    IterativeDPOParams,
    KTOParams,
    ORPOParams,
    PolicyParams,
    PPOParams,
    RLOOParams,
)

Settings = dict[str, Any]
"""Arguments that the configurations of several of TRL's trainers have in common."""


@dataclass(frozen=True)
class PolicyFiles:
    """What a policy is trained from: the SFT model, the reward model, rows of prompts and of preferences."""

    sft: Path
    reward: Path
    prompts: Path
    preferences: Path


def train_policy(
    params: PolicyParams,
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
    match params:
        case PPOParams():
            from rlhf.policies.ppo import train_ppo

            return train_ppo(params, files, seed, log, checkpoints)
        case DPOParams():
            from rlhf.policies.dpo import train_dpo

            return train_dpo(params, files, seed, log)
        case KTOParams():
            from rlhf.policies.kto import train_kto

            return train_kto(params, files, seed, log)
        case ORPOParams():
            from rlhf.policies.orpo import train_orpo

            return train_orpo(params, files, seed, log)
        case CPOParams():
            from rlhf.policies.cpo import train_cpo

            return train_cpo(params, files, seed, log)
        case GRPOParams():
            from rlhf.policies.grpo import train_grpo

            return train_grpo(params, files, seed, log)
        case RLOOParams():
            from rlhf.policies.rloo import train_rloo

            return train_rloo(params, files, seed, log)
        case IterativeDPOParams():
            from rlhf.policies.iterative_dpo import train_iterative_dpo

            return train_iterative_dpo(params, files, seed, log)
