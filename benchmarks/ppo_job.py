"""Our side of benchmarks/ppo.py: one job, in a process of its own.

python benchmarks/ppo_job.py JOB.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ppo_measures import Measures
from rlhf.models import trained_weights
from rlhf.params import PPOParams
from rlhf.params.rewards import ModelReward
from rlhf.policies import PolicyFiles, train_policy
from rlhf.team import join_team


class Watch:
    """Times every rollout with its updates, keeps the figures, and saves the policy where it is asked for."""

    key = "benchmark"
    inputs: list[Path] = []

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        self.job, self.folder = job, folder
        self.measures = Measures()

    def log(self, figures: Mapping[str, float], _step: int) -> None:
        self.measures.rows.append(dict(figures))

    def look(self, model: Any, step: int, total: int | None) -> bool:
        """Called at the start and after every step; its own time counts for nothing."""
        if step:
            self.measures.stop()
        if step and self.job["snapshot_every"] and step % self.job["snapshot_every"] == 0:
            folder = self.folder / f"step-{step:06}"
            folder.mkdir(exist_ok=True)
            weights = {name: value.detach() for name, value in trained_weights(model).items()}
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text((Path(self.job["model"]) / "config.json").read_text())
        self.measures.start()
        return False

    def roll_back(self, model: Any, step: int) -> None:
        """The last state counts."""

    def state(self) -> None:
        """A job is not resumed."""

    def restore(self, state: Any) -> None:
        """A job is not resumed."""


def settings(job: dict[str, Any]) -> PPOParams:
    """The job's settings as params; what the other side has no name for is off."""
    named = {name: value for name, value in job.items() if name in PPOParams.model_fields}
    return PPOParams(
        **named,
        algorithm="ppo",
        rewards={"reward_model": ModelReward(kind="reward_model", weight=1.0)},
        score_scaling="none",
        score_clip=None,
        mask_truncated=False,
        adaptive_beta=None,
        kl_in="reward",
        kl_estimator="k1",
        advantage="gae",
        group_size=1,
        vllm=None,
        dynamic_sampling=None,
        whiten_advantages=True,
        critic="separate",
        critic_learning_rate=job["learning_rate"],
        clip_range_high=None,
        dual_clip=None,
        entropy_coefficient=0.0,
        target_kl=None,
        lr_scheduler="constant",
        warmup_share=0.0,
        weight_decay=0.0,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        precision="fp32",
        adapter=None,
    )


def main() -> None:
    """Train, and write what was measured."""
    path = Path(sys.argv[1])
    job, folder = json.loads(path.read_text()), path.parent
    files = PolicyFiles(Path(job["model"]), Path(job["reward"]), Path(job["prompts"]), Path(job["prompts"]), Path())
    watch = Watch(job, folder)
    train_policy(settings(job), files, job["seed"], watch.log, watch=watch)
    if join_team().is_main:
        watch.measures.write(folder)


if __name__ == "__main__":
    main()
