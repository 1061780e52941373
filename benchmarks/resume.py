"""Does a training end at the same bytes after kill -9? PPO, GRPO and DPO, killed at random moments and run again.

Makes its own small world and model. Every fourth kill waits for a checkpoint that is being written. The last table is
what checkpoints cost when they may take a twentieth of the time and are as frequent as that allows.

    OMP_NUM_THREADS=1 python benchmarks/resume.py [--kills 20] [--seed 0] [--hidden-size 64]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils import logging
from trl import DPOTrainer, GRPOTrainer  # noqa: F401 - trainings are forks of this process, and need not import them

from rlhf.checkpoints import Checkpoints
from rlhf.curves import CurveRecorder, no_log
from rlhf.data.formats import write_rows
from rlhf.data.world import make_world
from rlhf.models import load_scorer, load_tokenizer, save_model, set_determinism
from rlhf.params import PolicyParams
from rlhf.params.rewards import ModelReward
from rlhf.params_file import load_params
from rlhf.policies import PolicyFiles, train_policy
from rlhf.pretraining import build_model, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PARAMS = load_params(ROOT / "params.yaml")
FORK = multiprocessing.get_context("fork")
COMMON = {"batch_size": 8, "lr_scheduler": "cosine", "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
JUDGED = {
    "reward_model": ModelReward(kind="reward_model", weight=1.0)
}  # by rule, all answers of a random model would be equally bad
ONLINE = {"update_epochs": 2, "max_new_tokens": 8, "group_size": 4, "steps": 16, "rewards": JUDGED}
CHANGES = {
    "ppo": COMMON | ONLINE | {"minibatches": 2, "score_scaling": "running"},
    "grpo": COMMON | ONLINE,
    "dpo": COMMON | {"epochs": 4.0, "contradicted": "keep", "max_length": 256},
}
SEED = 5


@dataclass(frozen=True)
class Kill:
    """One kill: after which step, from which checkpoint the next run went on, and how it ended."""

    method: str
    step: int
    resumed: int
    writing: bool
    equal: bool


class Watched(Checkpoints):
    """Checkpoints that tell another process how far the training is, and what they took."""

    def __init__(self, folder: Path, share: float, step: Any) -> None:
        super().__init__(folder, 0.0, share)
        self._step = step
        self.seconds = 0.0

    def offer(self, step: int, make_state: Callable[[], dict[str, Any]]) -> None:
        self._step.value = step
        started = time.perf_counter()
        super().offer(step, make_state)
        self.seconds += time.perf_counter() - started


# trainings in processes of their own --------------------------------------------------------------


def make_files(folder: Path, hidden_size: int) -> None:
    """A small world and a model with random weights, which are all that a comparison of bytes needs."""
    world = PARAMS.prepare.world
    assert world is not None
    sizes = {"demonstrations": 40, "pairs": 64, "prompts": 24, "test_prompts": 16}
    pretraining = world.pretraining.model_copy(update={"hidden_size": hidden_size, "problems": 200, "drills": 200})
    made = make_world(world.model_copy(update={**sizes, "pretraining": pretraining}), SEED)
    tokenizer = train_tokenizer([story + rest for story, rest in made.texts], 300, 128)
    files = policy_files(folder)
    save_model(build_model(pretraining, tokenizer, SEED), tokenizer, files.sft)
    set_determinism(SEED)
    save_model(load_scorer(files.sft), tokenizer, files.reward)
    write_rows(files.prompts, made.prompts[0])
    write_rows(files.preferences, made.preferences[0])


def policy_files(folder: Path) -> PolicyFiles:
    return PolicyFiles(folder / "sft", folder / "reward", folder / "prompts.jsonl", folder / "preferences.jsonl", ROOT)


def section(method: str) -> PolicyParams:
    """The default policy at a size at which it trains in seconds, in which more than weights changes."""
    return PARAMS.policies[method].model_copy(update=CHANGES[method])


def train(method: str, world: Path, results: Path, checkpoints: Watched | None) -> None:
    """Train as the stage does, and leave model, curves and what the checkpoints cost in `results`."""
    results.mkdir(parents=True)
    output = os.open(results / "output.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    started = time.perf_counter()
    curves = CurveRecorder(no_log)
    model = train_policy(section(method), policy_files(world), SEED, curves, checkpoints)
    seconds = time.perf_counter() - started
    save_model(model, load_tokenizer(world / "sft"), results)
    curves.write(results / "curves.csv")
    spent = checkpoints.seconds if checkpoints else 0.0
    (results / "cost.json").write_text(json.dumps({"seconds": seconds, "spent": spent}))


def start(method: str, world: Path, results: Path, checkpoints: Watched | None) -> Any:
    process = FORK.Process(target=train, args=(method, world, results, checkpoints))
    process.start()
    return process


def finish(method: str, world: Path, results: Path, checkpoints: Watched | None) -> float:
    """Train to the end; returns seconds."""
    started = time.perf_counter()
    process = start(method, world, results, checkpoints)
    process.join()
    if process.exitcode:
        raise SystemExit(
            f"{method} ended with status {process.exitcode}: {(results / 'output.txt').read_text()[-2000:]}"
        )
    return time.perf_counter() - started


def outcome(results: Path) -> tuple[bytes, bytes]:
    """Weights and curves."""
    curves = results / "curves.csv"
    return (results / "model.safetensors").read_bytes(), curves.read_bytes() if curves.exists() else b""


# kills --------------------------------------------------------------------------------------------


def kill_once(method: str, world: Path, folder: Path, moment: float, aimed: bool) -> Kill | None:
    """Kill a training after `moment` seconds and run it again; None where it was over before.

    `aimed`: not at once, but as soon as a checkpoint is being written.
    """
    step, state = FORK.Value("i", 0), folder / "state"
    process = start(method, world, folder / "killed", Watched(state, math.inf, step))
    process.join(moment)
    while aimed and process.is_alive() and not list(state.glob("*/*.partial")):
        pass
    process.kill()
    process.join()
    if process.exitcode == 0:
        return None
    written = sorted(int(path.stem) for path in state.glob("*/*.pt"))
    writing = bool(list(state.glob("*/*.partial")))
    finish(method, world, folder / "resumed", Watched(state, math.inf, FORK.Value("i", 0)))
    equal = outcome(folder / "resumed") == outcome(world / method)
    return Kill(method, step.value, written[-1] if written else 0, writing, equal)


def main() -> None:
    """Train each method undisturbed, then kill and resume it at random moments, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=64)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as place:
        world = Path(place) / "world"
        making = FORK.Process(target=make_files, args=(world, options.hidden_size))
        making.start()
        making.join()
        duration = {method: finish(method, world, world / method, None) for method in CHANGES}
        if any(outcome(world / method)[0] == outcome(world / "sft")[0] for method in CHANGES):
            raise SystemExit("a policy did not move, so that its bytes would prove nothing")
        kills: list[Kill] = []
        with tqdm(total=options.kills, unit="kill", disable=False) as bar:
            while len(kills) < options.kills:
                method = list(CHANGES)[len(kills) % len(CHANGES)]
                moment = chance.uniform(0.0, duration[method])
                with tempfile.TemporaryDirectory(dir=place) as folder:
                    kill = kill_once(method, world, Path(folder), moment, len(kills) % 4 == 3)
                if kill:
                    kills.append(kill)
                    bar.update()
        print_kills(kills)
        print_cost(world, Path(place))
    if not all(kill.equal for kill in kills):
        raise SystemExit("a training did not end at the bytes of an undisturbed one")


def print_kills(kills: list[Kill]) -> None:
    print(
        "| method | killed after step | resumed from | a checkpoint was half written | equal |\n|---|---|---|---|---|"
    )
    for kill in sorted(kills, key=lambda kill: (kill.method, kill.step)):
        print("| " + " | ".join("yes" if value is True else "no" if value is False else str(value)
                                for value in asdict(kill).values()) + " |")  # fmt: skip


def print_cost(world: Path, place: Path) -> None:
    """What checkpoints take of a training that writes as many as the rule allows."""
    print("\n| method | seconds | of which checkpoints | MB each |\n|---|---|---|---|")
    for method in CHANGES:
        folder = place / f"cost-{method}"
        finish(method, world, folder, Watched(folder / "state", 0.05, FORK.Value("i", 0)))
        cost = json.loads((folder / "cost.json").read_text())
        size = max(path.stat().st_size for path in folder.glob("state/*/*.pt")) / 1e6
        print(f"| {method} | {cost['seconds']:.1f} | {cost['spent'] / cost['seconds']:.1%} | {size:.1f} |")


if __name__ == "__main__":
    main()
