r"""Peak memory of PPO's four roles: one base with adapters and a reward model, against four models of their own.

A randomly initialised Llama of SmolLM2-135M's shape (or --model) trains for two rollouts on short sequences, so that
weights, gradients and moments dominate; each setting in a process of its own, several times in turn. What the libraries
alone need is measured too and shown apart.

    python benchmarks/ppo_memory.py --folder …/memory [--model FOLDER] [--peer …/trl112/bin/python]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ppo import COMMON, HERE, ROOT
from ppo_job import settings
from ppo_measures import peak_mib
from rlhf.curves import no_log
from rlhf.data.formats import with_ids, write_rows
from rlhf.models import load_causal, load_scorer, load_tokenizer, save_model, set_determinism
from rlhf.params import AdapterParams
from rlhf.policies import PolicyFiles, train_policy
from rlhf.pretraining import train_tokenizer

ADAPTER = AdapterParams(rank=8, alpha=16, dropout=0.0, target_modules="all-linear", quantise=None)
SETTINGS: dict[str, dict[str, Any]] = {
    "libraries": {},
    "four models": {"critic": "separate", "adapter": None},
    "four roles on one base": {"critic": "adapter", "adapter": ADAPTER},
    "the same, frozen weights in bf16": {"critic": "adapter", "adapter": ADAPTER, "precision": "bf16"},
}
PEER = "four models, TRL"
SMALL = {"batch_size": 8, "minibatches": 4, "update_epochs": 1, "max_new_tokens": 8, "steps": 2}


def main() -> None:
    """Measure every setting in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder of a causal model, instead of the random one")
    parser.add_argument("--peer", type=Path, help="python of an environment with trl 1.12.0")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        print(json.dumps(measure(options.setting, options.folder)))
        return
    prepare(options.folder, options.model)
    names = [*SETTINGS, *([PEER] if options.peer else [])]
    cells = [(name, run) for run in range(options.runs) for name in names]
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for name, _ in tqdm(cells, desc="memory", unit="run"):
        peaks[name].append(run_peer(options) if name == PEER else run_ours(name, options.folder))
    found = {name: float(np.median(values)) for name, values in peaks.items()}
    print("| setting | peak MiB | ratio | without the libraries |\n|---|---|---|---|")
    whole, alone = found["four models"], found["libraries"]
    for name, peak in found.items():
        print(f"| {name} | {peak:.0f} | {peak / whole:.2f} | {(peak - alone) / (whole - alone):.2f} |")


def prepare(folder: Path, model: Path | None) -> None:
    """The models and prompts that all settings read, made once."""
    if (folder / "prompts.jsonl").exists():
        return
    if model is None:
        model = folder / "base"
        build_random(model)
    tokenizer = load_tokenizer(model)
    set_determinism(0)
    for one, place in ((load_causal(model), folder / "model"), (load_scorer(model), folder / "reward")):
        one.config.pad_token_id = tokenizer.pad_token_id
        save_model(one, tokenizer, place)
    write_rows(folder / "prompts.jsonl", with_ids({"prompt": f"{number} and {number + 1}"} for number in range(64)))


def build_random(folder: Path) -> None:
    """A Llama of SmolLM2-135M's shape with random weights, and a small tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer: Any = train_tokenizer(["one and two", "3 and 4"], 300, 2048)
    set_determinism(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(LlamaForCausalLM(config), tokenizer, folder)


def make_job(folder: Path) -> dict[str, Any]:
    """The settings of a short training."""
    places = {name: str((folder / name).resolve()) for name in ("model", "reward")}
    return {
        **COMMON,
        **SMALL,
        **places,
        "prompts": str((folder / "prompts.jsonl").resolve()),
        "seed": 0,
        "snapshot_every": 0,
    }


def measure(name: str, folder: Path) -> float:
    """Train, unless only the libraries are asked for; returns this process's peak in MiB."""
    if name != "libraries":
        job = make_job(folder)
        files = PolicyFiles(Path(job["model"]), Path(job["reward"]), Path(job["prompts"]), Path(job["prompts"]), Path())
        train_policy(settings(job).model_copy(update=SETTINGS[name]), files, 0, no_log)
    return peak_mib()


def run_ours(name: str, folder: Path) -> float:
    """One setting in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--setting", name]
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    return json.loads(subprocess.check_output(command, text=True, env=environment).splitlines()[-1])


def run_peer(options: argparse.Namespace) -> float:
    """TRL's trainer on the same job."""
    folder = options.folder / "peer"
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_text(json.dumps(make_job(options.folder)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(options.peer.absolute()), str(HERE / "trl_ppo.py"), str((folder / "job.json").resolve())]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return json.loads((folder / "result.json").read_text())["peak_mib"]


if __name__ == "__main__":
    main()
