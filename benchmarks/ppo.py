r"""PPO against the last PPOTrainer of TRL: throughput, memory, and what is learnt at which distance from the SFT model.

Each side trains in a process of its own with its own interpreter, in turn and beside nothing of the other: the same
model, prompts, reward model and settings, in full precision. Part `throughput` trains --model for some rollouts against
a reward model with a random head, which costs what a trained one costs. Part `learning` needs a pipeline that has run
as far as the stage reward, and measures the policy every few rollouts on held-out prompts, both sides by one yardstick.
Results go to --folder, one file per side and seed; what is there is not run again.

    python -m venv …/trl112 && …/trl112/bin/pip install torch trl==1.12.0
    python benchmarks/ppo.py --peer …/trl112/bin/python --folder …/ppo --model FOLDER --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ppo_tables import PARTS, SIDES, Runs, draw, show_learning, show_throughput
from rlhf.curves import write_json
from rlhf.data.formats import training_rows, write_rows
from rlhf.data.world import make_world
from rlhf.errors import UserError
from rlhf.evaluation.generation import Decoding, generate
from rlhf.evaluation.kl import completion_log_probs, kl_to_reference
from rlhf.models import load_causal, load_scorer, load_tokenizer, save_model, set_determinism
from rlhf.params_file import load_params
from rlhf.rewards.answers import answer_reward
from rlhf.scoring import RewardModel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COMMON = {
    "batch_size": 64,
    "minibatches": 4,
    "update_epochs": 4,
    "max_new_tokens": 48,
    "temperature": 1.0,
    "missing_eos_penalty": 1.0,
    "learning_rate": 1e-4,
    "max_grad_norm": 1.0,
    "beta": 0.05,
    "clip_range": 0.2,
    "value_clip_range": 0.2,
    "value_coefficient": 0.5,
    "gamma": 1.0,
    "gae_lambda": 0.95,
}
EVALUATION_SEED = 9


@dataclass(frozen=True)
class Setting:
    """What one part trains: the policy's and the reward model's folder, prompts to train on, and further settings."""

    model: Path
    reward: Path
    prompts: Path
    changes: dict[str, Any]


def main() -> None:
    """Run what is missing, measure the snapshots, print the tables and draw the figure."""
    options = parse()
    settings = {part: SETTINGS[part](options) for part in options.parts}
    cells = list(plan(options))
    for part, seed, side in tqdm(cells, desc="runs", unit="run"):
        folder = options.folder / part / f"seed-{seed}" / side
        if not (folder / "result.json").exists():
            run(side, folder, settings[part], seed, options)
        if part == "learning" and not (folder / "evaluation.json").exists():
            write_json(folder / "evaluation.json", evaluate(folder, settings[part], options.world))
    found: dict[str, Runs] = {part: {side: [] for side in SIDES} for part in options.parts}
    for part, seed, side in cells:
        folder = options.folder / part / f"seed-{seed}" / side
        names = ("result", "evaluation") if part == "learning" else ("result",)
        found[part][side].append({name: json.loads((folder / f"{name}.json").read_text()) for name in names})
    for part, runs in found.items():
        show_throughput(runs, COMMON["batch_size"])
        if part == "learning":
            show_learning(runs)
            draw(runs, options.folder / "learning.png")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="python of an environment with trl 1.12.0")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder of the causal model that `throughput` trains")
    parser.add_argument("--world", type=Path, default=ROOT, help="a pipeline that has run as far as the stage reward")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=40, help="rollouts of `learning`; of `throughput` 6")
    parser.add_argument("--threads", type=int, default=2, help="of torch in each process, on both sides")
    parser.add_argument("--processes", type=int, default=1, help="that share a training, on both sides")
    options = parser.parse_args()
    if "throughput" in options.parts and options.model is None:
        parser.error("the part throughput needs --model, the folder of a causal model")
    return options


def plan(options: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Every run, the sides in turn; who goes first changes with the seed."""
    for part in options.parts:
        for place, seed in enumerate(options.seeds):
            for side in SIDES[:: 1 if place % 2 == 0 else -1]:
                yield part, seed, side


# settings -----------------------------------------------------------------------------------------


def set_up_throughput(options: argparse.Namespace) -> Setting:
    """The named model, a reward model of its shape with a random head, and the embedded world's prompts."""
    folder = options.folder / "throughput"
    setting = Setting(folder / "model", folder / "reward", folder / "prompts.jsonl", {"steps": 6, "snapshot_every": 0})
    if setting.prompts.exists():
        return setting
    tokenizer: Any = load_tokenizer(options.model)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        # The other side takes every padding token for padding, the end token too where it is the same.
        if tokenizer.unk_token_id is None:
            raise UserError(f"the tokenizer in {options.model} pads with its end token; give it a padding token")
        tokenizer.pad_token = tokenizer.unk_token
    set_determinism(0)
    for model, place in (
        (load_causal(options.model), setting.model),
        (load_scorer(options.model), setting.reward),
    ):
        model.config.pad_token_id = tokenizer.pad_token_id
        save_model(model, tokenizer, place)
    params = load_params(ROOT / "params.yaml")
    assert params.prepare.world is not None
    write_rows(setting.prompts, make_world(params.prepare.world, params.seed).prompts[0])
    return setting


def set_up_learning(options: argparse.Namespace) -> Setting:
    """The embedded world's SFT and reward model."""
    world, steps = options.world, options.steps
    setting = Setting(
        world / "models/sft",
        world / "models/reward",
        world / "data/validated/prompts/train.jsonl",
        {"steps": steps, "snapshot_every": max(1, steps // 8)},
    )
    for path in (setting.model, setting.reward, setting.prompts):
        if not path.exists():
            raise UserError(f"there is no {path}; run the pipeline as far as the stage reward, or name --world")
    return setting


SETTINGS = {"throughput": set_up_throughput, "learning": set_up_learning}

# runs ---------------------------------------------------------------------------------------------


def run(side: str, folder: Path, setting: Setting, seed: int, options: argparse.Namespace) -> None:
    """One side's training in a process of its own; its output goes to a file beside the results."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {**COMMON, **setting.changes, "seed": seed, "processes": options.processes}
    places = {"model": setting.model, "reward": setting.reward, "prompts": setting.prompts}
    job |= {name: str(place.resolve()) for name, place in places.items()}
    (folder / "job.json").write_text(json.dumps(job, indent=2))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    python, script = {
        "ours": (sys.executable, HERE / "ppo_job.py"),
        "trl": (str(options.peer.absolute()), HERE / "trl_ppo.py"),
    }[side]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": str(options.threads), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    if side == "ours":
        environment["PYTHONPATH"] = str(ROOT)
    with (folder / "output.txt").open("w") as output:
        done = subprocess.run(
            [python, *(launcher if options.processes > 1 else []), str(script), str((folder / "job.json").resolve())],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise UserError(f"{side} ended with status {done.returncode}; its output is in {folder / 'output.txt'}")


def evaluate(folder: Path, setting: Setting, world: Path) -> list[dict[str, float]]:
    """Proxy, gold and KL (nats per answer, k3) of every snapshot, the SFT model first, on the same held-out prompts."""
    rows = training_rows(world / "data/validated/prompts/test.jsonl")[:256]
    prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    tokenizer: Any = load_tokenizer(setting.model)
    reference, scorer = load_causal(setting.model), RewardModel(setting.reward, 128)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    decoding = Decoding(COMMON["max_new_tokens"], COMMON["temperature"], 128, EVALUATION_SEED)
    found = []
    for place in [None, *sorted(folder.glob("step-*"))]:
        policy = reference if place is None else load_causal(place)
        drawn = generate(policy, tokenizer, prompts, decoding)
        sequences = list(zip(encoded, [one.token_ids for one in drawn], strict=True))
        log_probs = [completion_log_probs(one, sequences, 1.0, 128) for one in (policy, reference)]
        texts = [one.text for one in drawn]
        found.append(
            {
                "step": 0 if place is None else int(place.name.split("-")[1]),
                "kl": kl_to_reference(log_probs[0], log_probs[1], "k3"),
                "proxy": sum(scorer.score(prompts, texts)) / len(rows),
                "gold": sum(answer_reward(prompts, texts, answer=answers)) / len(rows),
                "tokens": sum(len(one.token_ids) for one in drawn) / len(rows),
                "ended": sum(one.ended for one in drawn) / len(rows),
            }
        )
    return found


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
