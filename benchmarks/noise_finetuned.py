"""Objectives of a reward model that is trained whole and memorises: the embedded world's transformer, uniform noise.

python benchmarks/noise_finetuned.py --folder /tmp/finetuned --seeds 0 1 2 3 4

Every seed has a world, a base model and wrong labels of its own; the held-out labels are right. All objectives see the
same pairs in the same order and are told the rate; nothing else is set for them. What a folder holds is not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from noise_tables import compare
from rlhf.curves import no_log
from rlhf.data.formats import read_rows, write_rows
from rlhf.params import Params
from rlhf.reward_losses import OBJECTIVES
from tasks import embed, prepare, reward, sft, validate
from tasks.paths import Paths
from worlds import read_values

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = "selective at once"
"""The same without warm-up and ramp: what trust condemns is left out from the first batch on."""
PAIRS, TEST_PROMPTS = 1000, 2000
"""Pairs to train on, and prompts of which half have a pair to be measured by."""


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rate", type=float, default=0.4, help="share of wrong training labels")
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--objectives", nargs="+", choices=[*OBJECTIVES, AT_ONCE], default=[*OBJECTIVES, AT_ONCE])
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {objective: [] for objective in options.objectives}
    for seed, objective in tqdm([(seed, objective) for seed in options.seeds for objective in found]):
        found[objective].append(run(options, seed, objective))
    compared = compare(found, "bradley_terry")
    print(f"| objective | accuracy, {len(options.seeds)} seeds | AUROC | AUROC of finding wrong labels |")
    print("|---" * 4 + "|")
    for objective, results in found.items():
        auroc, audit = (np.mean([result[name] for result in results]) for name in ("auroc", "audit_auroc"))
        print(f"| `{objective}` | {compared[objective]} | {auroc:.3f} | {audit:.3f} |")


def run(options: argparse.Namespace, seed: int, objective: str) -> dict[str, float]:
    """The stage's metrics with one objective."""
    paths = Paths(options.folder / f"seed-{seed}")
    done = paths.root / f"{objective}.json"
    if not done.exists():
        params = make_params(seed, objective, options)
        if not paths.metrics("embed").exists():
            prepare_noisy(params, paths, options.rate)
        reward.run(params, paths, no_log)
        paths.metrics("reward").rename(done)
    return json.loads(done.read_text(encoding="utf-8"))


def make_params(seed: int, objective: str, options: argparse.Namespace) -> Params:
    values: dict[str, Any] = read_values(ROOT / "params.yaml", seed)
    values["prepare"]["world"] |= {"pairs": PAIRS, "test_prompts": TEST_PROMPTS}
    values["prepare"]["world"]["noise"]["rate"] = 0.0
    values["reward"] |= {"objective": objective, "noise_rate": options.rate, "epochs": options.epochs}
    if objective == AT_ONCE:
        values["reward"] |= {"objective": "selective", "warmup_epochs": 0.0, "ramp_epochs": 0.0}
    return Params.model_validate(values)


def prepare_noisy(params: Params, paths: Paths, rate: float) -> None:
    """The stages before the reward model, with training labels turned around at random."""
    for stage in (prepare, validate):
        stage.run(params, paths, no_log)
    file = paths.rows("preferences", "train")
    rows = read_rows(file)
    for row, is_wrong in zip(rows, np.random.default_rng(params.seed).random(len(rows)) < rate, strict=True):
        if is_wrong:
            row |= {"chosen": row["rejected"], "rejected": row["chosen"], "truth_flipped": True}
    write_rows(file, rows)
    for stage in (sft, embed):
        stage.run(params, paths, no_log)


if __name__ == "__main__":
    main()
