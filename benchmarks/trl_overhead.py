"""Trainings by TRL's trainers through alignflow, against TRL alone: whole trainings, the sides in turn.

python benchmarks/trl_overhead.py --workspace . --pairs 3

`alignflow` is train_policy with checkpoints and curves, `bare` a script with TRL's trainer at the same settings, and
`defaults` (DPO) the same with TRL's own choices where params.yaml has no say: recomputed activations, the reference in
every step. Needs a workspace that ran as far as the stage reward. Each training is a process of its own; counted from
the reading of rows and models to the trained policy, in seconds of the processor, as other work on the machine
stretches the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SIDES = {"dpo": ("alignflow", "bare", "defaults"), "grpo": ("alignflow", "bare"), "rloo": ("alignflow", "bare")}
STEPS = {"dpo": 48, "grpo": 20, "rloo": 20}


def main() -> None:
    """Train in turn and print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3, help="trainings of each side")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        train(options.workspace, *options.run)
        return
    jobs = [(method, side) for _ in range(options.pairs) for method, sides in SIDES.items() for side in sides]
    seconds: dict[tuple[str, str], list[float]] = {}
    for method, side in tqdm(jobs):
        seconds.setdefault((method, side), []).append(run_process(options.workspace, method, side))
    print("| method | steps | side | processor seconds | times as fast as bare TRL (range) |\n|---|---|---|---|---|")
    for (method, side), ours in seconds.items():
        ratios = np.array(seconds[method, "bare"]) / np.array(ours)
        spread = f"{ratios.mean():.2f} ({ratios.min():.2f}–{ratios.max():.2f})"
        print(f"| {method} | {STEPS[method]} | {side} | {np.mean(ours):.1f} | {spread} |")


def run_process(workspace: Path, method: str, side: str) -> float:
    command = [sys.executable, __file__, "--workspace", str(workspace), "--run", method, side]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    output = subprocess.check_output(command, text=True, env=environment, stderr=subprocess.DEVNULL)
    return json.loads(output.splitlines()[-1])


def train(workspace: Path, method: str, side: str) -> None:
    """One training; prints the seconds of the processor that this process has used."""
    from rlhf.params import Params
    from rlhf.policies import PolicyFiles
    from tasks.paths import Paths

    paths = Paths(workspace.resolve())
    section = Params.model_validate(values(method)).policies[method]
    files = PolicyFiles(
        sft=paths.model("sft"),
        reward=paths.model("reward"),
        prompts=paths.rows("prompts", "train"),
        preferences=paths.rows("preferences", "train"),
        root=paths.root,
    )
    from trl import DPOTrainer, GRPOTrainer, RLOOTrainer  # noqa: F401 - TRL imports them when they are asked for

    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if side == "alignflow":
            train_ours(section, files, Path(folder))
        else:
            train_bare(section, files, Path(folder), side)
    print(json.dumps(time.process_time() - began))


def values(method: str) -> dict[str, Any]:
    """The recipe of all methods with one of them, for some steps."""
    from worlds import read_values

    raw = read_values(ROOT / "recipes" / "all-methods.yaml", 17)
    policy = raw["policies"][method]
    policy |= (
        {"contradicted": "keep"}
        if method == "dpo"
        else {"rewards": {"answer": {"kind": "answer", "weight": 1.0, "answer_in": "form"}}}
    )
    policy |= {"epochs": STEPS[method] / 64} if method == "dpo" else {"steps": STEPS[method]}
    raw["policies"] = {method: policy}
    return raw


def train_ours(section: Any, files: Any, folder: Path) -> None:
    from rlhf.checkpoints import Checkpoints
    from rlhf.curves import no_log
    from rlhf.policies import train_policy

    train_policy(section, files, 17, no_log, Checkpoints(folder, 60.0, 0.05))


def train_bare(section: Any, files: Any, folder: Path, side: str) -> None:
    """What a person would write with TRL alone."""
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf.models import trainer_settings
    from rlhf.policies.groups import group_settings
    from rlhf.rewards.answers import answer_reward

    tokenizer = AutoTokenizer.from_pretrained(files.sft)
    settings = trainer_settings(section, 17, folder)
    if section.algorithm == "dpo":
        rows: Any = load_dataset("json", data_files=str(files.preferences), split="train")
        rows = rows.select_columns(["prompt", "chosen", "rejected"])
        ours: Any = {"precompute_ref_log_probs": True}
        if side == "defaults":
            ours = {}
            settings.pop("activation_checkpointing")
        arguments = trl.DPOConfig(
            **settings,
            **ours,
            num_train_epochs=section.epochs,
            loss_type=[section.loss, "sft"],
            loss_weights=[1.0, section.sft_weight],
            beta=section.beta,
            max_length=section.max_length,
        )
        model, reference = (AutoModelForCausalLM.from_pretrained(files.sft) for _ in range(2))
        trainer: Any = trl.DPOTrainer(model, reference, arguments, train_dataset=rows, processing_class=tokenizer)
    else:
        rows = load_dataset("json", data_files=str(files.prompts), split="train")
        settings |= group_settings(section)
        kind, configuration = {
            "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
            "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
        }[section.algorithm]
        trainer = kind(
            model=str(files.sft),
            reward_funcs=[answer_reward],
            args=configuration(**settings),
            train_dataset=rows.remove_columns(["id"]),
            processing_class=tokenizer,
        )
    trainer.train()


if __name__ == "__main__":
    main()
