"""Policy optimisation: PPO of our own; DPO, also in rounds, KTO, ORPO, CPO, GRPO and RLOO over TRL."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.checkpoints import Checkpoints, Part, Parts, training_key
from rlhf.curves import Log
from rlhf.ledger import Ledger
from rlhf.params import (
    CPOParams,
    DPOParams,
    GRPOParams,
    IterativeDPOParams,
    KTOParams,
    LedgerParams,
    ORPOParams,
    PairParams,
    PolicyParams,
    PPOParams,
    RLOOParams,
    inputs_read,
    reads_reward_model,
)
from rlhf.team import Team, join_team

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from rlhf.policies.watching import Watch

Settings = dict[str, Any]
"""Arguments that the configurations of several of TRL's trainers have in common."""


@dataclass(frozen=True)
class PolicyFiles:
    """What a policy is trained from: the SFT model, the reward model, rows of prompts and of preferences.

    Paths in the section `rewards` begin at `root`.
    """

    sft: Path
    reward: Path
    prompts: Path
    preferences: Path
    root: Path


@dataclass(frozen=True)
class Run:
    """One training: its seed, who hears its figures, where it goes on from when stopped, who looks at the policy.

    `ledger` accounts for the rows; by default it refuses any that is too long. Of several processes, the `team`, only
    the main one looks and writes checkpoints.
    """

    seed: int
    log: Log
    checkpoints: Checkpoints | None = None
    watch: Watch | None = None
    ledger: Ledger = field(default_factory=lambda: Ledger(LedgerParams(on_too_long="raise", max_lost_share=1.0)))
    team: Team = field(default_factory=Team)

    @property
    def parts(self) -> dict[str, Part]:
        """What changes beside any training."""
        return {"watch": self.watch} if self.watch else {}

    def resume(self, parts: Parts) -> bool:
        """Put back what a stopped training had come to; false where there is nothing to go on from."""
        state = self.team.from_main(lambda: self.checkpoints.resume() if self.checkpoints else None)
        if state:
            parts.restore(state)
        return bool(state)

    def offer(self, step: int, parts: Parts) -> None:
        """Write a checkpoint where one is due."""
        if self.checkpoints and self.team.is_main:
            self.checkpoints.offer(step, parts.state)

    def look(self, model: Any, step: int, total: int | None) -> bool:
        """Have the watch look; true where training shall end."""
        watch = self.watch
        return watch is not None and self.team.from_main(lambda: watch.look(model, step, total))

    def roll_back(self, model: Any, step: int) -> None:
        """Go back to the best state that the watch has seen."""
        if self.watch and self.team.is_main:
            self.watch.roll_back(model, step)

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """Through which transformers' trainers let themselves be looked at."""
        from rlhf.policies.watching import Watching

        return [Watching(self)] if self.watch else []


def train_policy(
    params: PolicyParams,
    files: PolicyFiles,
    seed: int,
    log: Log,
    checkpoints: Checkpoints | None = None,
    watch: Watch | None = None,
    ledger: Ledger | None = None,
) -> Any:
    """Train by the algorithm that `params` names; returns the model, adapters merged, in evaluation mode.

    The model on disk in `files.sft` is the reference and stays as it is. A training that was stopped goes on from
    `checkpoints`, to the same bytes and curves as one that was not. `watch` looks at the policy as it trains, and which
    of its states is returned is up to it. `ledger` decides on rows that are too long; without one they are refused.
    """
    team = join_team()
    run = Run(seed, log, checkpoints, watch, **({"ledger": ledger} if ledger else {}), team=team)
    if checkpoints and team.is_main:
        inputs: list[Path] = [*training_inputs(params, files), *(watch.inputs if watch else [])]
        other = f"{watch.key if watch else ''} {run.ledger.settings.model_dump_json()}"
        checkpoints.open(training_key(params, seed, list(dict.fromkeys(inputs)), other))
    # Imported here: TRL takes seconds, and a run needs one algorithm.
    match params:
        case PPOParams():
            from rlhf.policies.ppo import train_ppo

            return train_ppo(params, files, run)
        case DPOParams():
            from rlhf.policies.dpo import train_dpo

            return train_dpo(params, files, run)
        case KTOParams():
            from rlhf.policies.kto import train_kto

            return train_kto(params, files, run)
        case ORPOParams():
            from rlhf.policies.orpo import train_orpo

            return train_orpo(params, files, run)
        case CPOParams():
            from rlhf.policies.cpo import train_cpo

            return train_cpo(params, files, run)
        case GRPOParams():
            from rlhf.policies.grpo import train_grpo

            return train_grpo(params, files, run)
        case RLOOParams():
            from rlhf.policies.rloo import train_rloo

            return train_rloo(params, files, run)
        case IterativeDPOParams():
            from rlhf.policies.iterative_dpo import train_iterative_dpo

            return train_iterative_dpo(params, files, run)


def training_inputs(params: PolicyParams, files: PolicyFiles) -> list[Path]:
    """The files that a training reads, those of its rewards that are here among them."""
    if isinstance(params, PairParams):
        rows, judged, others = files.preferences, params.contradicted != "keep", []
    else:
        rows, judged = files.prompts, reads_reward_model(params.rewards)
        others = inputs_read(params.rewards, files.root)
    return [files.sft, rows, *([files.reward] if judged else []), *others]
