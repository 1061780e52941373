"""Our side of benchmarks/ppo.py: one job, in a process of its own.

python benchmarks/ppo_job.py JOB.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rlhf.checkpoints import Checkpoints
from rlhf.params import PPOParams, RewardMix
from rlhf.params.policies import Weight
from rlhf.policies import PolicyFiles
from rlhf.policies.ppo import train_ppo


class Watch(Checkpoints):
    """Times every rollout with its updates, keeps the figures, and saves the policy where it is asked for."""

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        super().__init__(folder, 0.0, 1.0)
        self.job, self.folder = job, folder
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self.rows: list[dict[str, float]] = []
        self.started = self.processor_started = 0.0

    def resume(self, key: str) -> None:
        """Never: a benchmark starts afresh."""
        self.started, self.processor_started = time.perf_counter(), time.process_time()

    def log(self, figures: Mapping[str, float], _step: int) -> None:
        self.rows.append(dict(figures))

    def offer(self, step: int, make_state: Callable[[], dict[str, Any]]) -> None:
        """Called after every step; the state's weights are the snapshot."""
        self.seconds.append(time.perf_counter() - self.started)
        self.processor_seconds.append(time.process_time() - self.processor_started)
        if self.job["snapshot_every"] and step % self.job["snapshot_every"] == 0:
            folder = self.folder / f"step-{step:06}"
            folder.mkdir(exist_ok=True)
            weights = make_state()["weights"]["policy"]
            save_file(
                {name: value.detach() for name, value in weights.items()},
                folder / "model.safetensors",
                {"format": "pt"},
            )
            (folder / "config.json").write_text((Path(self.job["model"]) / "config.json").read_text())
        self.started, self.processor_started = time.perf_counter(), time.process_time()


def settings(job: dict[str, Any]) -> PPOParams:
    """The job's settings as params; what the other side has no name for is off."""
    named = {name: value for name, value in job.items() if name in PPOParams.model_fields}
    return PPOParams(
        **named,
        algorithm="ppo",
        rewards=RewardMix(reward_model=Weight(weight=1.0)),
        score_scaling="none",
        score_clip=None,
        mask_truncated=False,
        adaptive_beta=None,
        kl_in="reward",
        kl_estimator="k1",
        advantage="gae",
        group_size=1,
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


def peak_mib() -> float:
    """The process's own peak of resident memory; `getrusage` would count the parent's too, from before the exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Train, and write what was measured."""
    path = Path(sys.argv[1])
    job, folder = json.loads(path.read_text()), path.parent
    files = PolicyFiles(Path(job["model"]), Path(job["reward"]), Path(job["prompts"]), Path(job["prompts"]))
    watch = Watch(job, folder)
    train_ppo(settings(job), files, job["seed"], watch.log, watch)
    result = {
        "seconds": watch.seconds,
        "processor_seconds": watch.processor_seconds,
        "peak_mib": peak_mib(),
        "curves": watch.rows,
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
