"""The embedded world under several seeds: every policy's figures and the time of each stage, as a Markdown table.

python benchmarks/default_world.py --folder /tmp/worlds [--seeds 17 1 2 3]

Each seed runs in a clone of its own under the folder; a clone that is complete is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("gold_reward", "gold_reward_greedy", "proxy_reward", "win_rate", "win_rate_low", "kl_to_sft", "stop_rate")
STAGES = (
    "prepare",
    "validate",
    "sft",
    "embed",
    "reward",
    "probe",
    "policy@ppo",
    "policy@dpo",
    "policy@grpo",
    "evaluate",
)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 1, 2, 3])
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    results = {seed: run(seed, options.folder / f"seed-{seed}") for seed in options.seeds}
    print("| seed | policy | " + " | ".join(name.replace("_", " ") for name in FIGURES) + " |")
    print("|---" * (len(FIGURES) + 2) + "|")
    for seed, (metrics, _) in results.items():
        for policy, figures in metrics.items():
            print(f"| {seed} | {policy} | " + " | ".join(f"{figures[name]:.3f}" for name in FIGURES) + " |")
    print("\n| seed | " + " | ".join(STAGES) + " | sum |")
    print("|---" * (len(STAGES) + 2) + "|")
    for seed, (_, seconds) in results.items():
        print(
            f"| {seed} | " + " | ".join(f"{seconds[s]:.0f} s" for s in STAGES) + f" | {sum(seconds.values()):.0f} s |"
        )


def run(seed: int, folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The metrics of evaluation and each stage's wall time with its start-up, one stage after the other."""
    if not folder.exists():
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        params = folder / "params.yaml"
        params.write_text(params.read_text().replace("seed: 17\n", f"seed: {seed}\n", 1))
    # The stages' `python` is the one that runs this; the clone has no environment of its own.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    times = folder / "times.json"
    seconds: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}
    for stage in STAGES:
        if stage in seconds:
            continue
        began = time.perf_counter()
        command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
        subprocess.run(command, cwd=folder, env=environment, check=True)
        seconds[stage] = time.perf_counter() - began
        times.write_text(json.dumps(seconds))
    return json.loads((folder / "metrics/evaluate.json").read_text()), seconds


if __name__ == "__main__":
    main()
