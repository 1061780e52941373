"""The repository's params at a size at which a stage trains in a second; every other value stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf.params import TransportParams
from rlhf.params.rewards import FunctionReward

ROOT = Path(__file__).resolve().parents[1]

_WORLD = {"demonstrations": 48, "pairs": 64, "prompts": 32, "test_prompts": 24}
_PRETRAINING = {
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
    "vocabulary": 300,
    "problems": 200,
    "drills": 100,
    "steps": 4,
    "batch_size": 4,
}
_TRAINING = {"batch_size": 8, "steps": 2, "epochs": 1, "group_size": 4, "max_new_tokens": 8, "evaluations": 1}
_EVALUATE = {"prompts": 8, "max_new_tokens": 8, "batch_size": 8, "samples_shown": 2, "best_of": 2}
ANSWER = {"kind": "answer", "weight": 1.0, "answer_in": "form"}
"""The reward of the right answer, as params name it."""
_WATCH = {"evaluations": 2, "prompts": 4}
_GATES = {
    "max_quarantined_share": 0.5,
    "min_rows": 1,
    "max_prompt_tokens": 120,
    "max_completion_tokens": 120,
    "max_duplicate_share": 1.0,
    "max_contradiction_share": 1.0,
}


def tiny_params(source: Path = ROOT / "params.yaml") -> dict[str, Any]:
    """The values of a params file, shrunk."""
    params = YAML(typ="safe", pure=True).load(source.read_text(encoding="utf-8"))
    if world := params["prepare"]["world"]:
        _shrink(world, _WORLD)
        _shrink(world["pretraining"], _PRETRAINING)
    params["validate"] |= _GATES
    params["ledger"]["max_lost_share"] = 1.0
    params["sft"]["min_stop_rate"] = 0.0
    for section in (params["sft"], params["embed"], params["reward"], *params["policies"].values()):
        _shrink(section, _TRAINING)
    _shrink(params["evaluate"], _EVALUATE)
    if watch := params["evaluate"]["watch"]:
        _shrink(watch, _WATCH)
    params["probe"] |= {"rows": 16, "on_hackable": "warn"}  # a model that trained for a second likes anything
    return params


def _shrink(section: dict[str, Any], sizes: dict[str, Any]) -> None:
    section.update({key: min(value, section[key]) for key, value in sizes.items() if section.get(key)})


def make_transport(**changes: Any) -> TransportParams:
    """The plan's section with the published costs."""
    values = {
        "label_weight": 0.1,
        "semantic_cost": "squared_euclidean",
        "scale": "max",
        "label_cost": "cross_entropy",
        "self_match_penalty": 0.0,
        "neighbours": None,
        "regularisation": None,
    }
    return TransportParams(**{**values, **changes})


def write_params(path: Path, params: dict[str, Any]) -> None:
    """Write a params file."""
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(params, file)


def change_params(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a params file in place."""
    params = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    change(params)
    write_params(path, params)


def share_of_letters(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """A reward that a policy of any size learns in a few steps: the share of small Latin letters."""
    return [sum("a" <= letter <= "z" for letter in text) / max(1, len(text)) for text in completions]


def paid_by_chance(folder: Path) -> dict[str, FunctionReward]:
    """The section `rewards` with a function, written to the folder, that pays half of all answers, however short."""
    (folder / "parity.py").write_text(
        "def parity(prompts, completions, **columns):\n"
        "    return [float(sum(map(ord, text)) % 2) for text in completions]\n"
    )
    return {"parity": FunctionReward(kind="function", weight=1.0, path="parity.py", name="parity")}


def run_python(arguments: list[str], search: list[Path] | None = None) -> None:
    """Run the interpreter on arguments, with modules of ours and of the folders in `search`; it has to succeed."""
    places = os.pathsep.join(map(str, [*(search or []), ROOT]))
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def run_in_two_processes(script: str, *arguments: str) -> None:
    """Run a script under torchrun, which starts it twice."""
    run_python(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *arguments])
