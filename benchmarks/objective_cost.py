"""What an epoch of each objective costs beside Bradley-Terry: the same model, pairs and batches, a fresh process each.

Needs a pipeline that has run as far as the stage reward. Doubts are zeros: what they cost is made before training.

    OMP_NUM_THREADS=1 python benchmarks/objective_cost.py [--model models/sft] [--pairs 512] [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

OBJECTIVES = ("bradley_terry", "selective", "co_teaching")
ROOT = Path(__file__).resolve().parents[1]


def run_epoch(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one epoch after one of eight pairs, and the process's peak memory in MiB."""
    from rlhf.curves import no_log
    from rlhf.data.formats import training_rows
    from rlhf.examples import Examples, encode_sides
    from rlhf.models import load_tokenizer
    from rlhf.pairwise import Job, Verdict, fit_scorer
    from rlhf.params_file import load_params

    changes = {"objective": options.objective, "batch_size": options.batch_size, "epochs": 1.0, "warmup_epochs": 0.0}
    section = load_params(ROOT / "params.yaml").reward.model_copy(update=changes)
    tokenizer = load_tokenizer(options.model)
    rows = training_rows(ROOT / "data/validated/preferences/train.jsonl")[: options.pairs]
    seconds = 0.0
    for count in (8, len(rows)):
        sides = encode_sides(tokenizer, rows[:count], ("chosen", "rejected"))
        places = np.arange(2 * count).reshape(-1, 2)
        pairs = Examples([row["id"] for row in rows[:count]], [""] * count, places, sides, None, 0)
        with tempfile.TemporaryDirectory() as folder:
            job = Job(options.model, tokenizer, pairs, None, 0.3, Path(folder), Verdict.blank(count))
            started = time.perf_counter()
            fit_scorer(section, job, 0, no_log)
            seconds = time.perf_counter() - started - seconds
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    """Run every objective in turn, several times over, and print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/sft")
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--objective", choices=OBJECTIVES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.objective:
        print(json.dumps(run_epoch(options)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in OBJECTIVES}
    for _ in range(options.runs):
        for name, results in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--objective", name]
            results.append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
    print("| objective | seconds | ratios | peak MiB | ratio |\n|---|---|---|---|---|")
    base = found["bradley_terry"]
    for name, results in found.items():
        ratios = sorted(one["seconds"] / other["seconds"] for one, other in zip(results, base, strict=True))
        seconds, peak = (float(np.median([one[key] for one in results])) for key in ("seconds", "peak_mib"))
        shown = f"{np.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        peak_ratio = peak / float(np.median([one["peak_mib"] for one in base]))
        print(f"| {name} | {seconds:.1f} | {shown} | {peak:.0f} | {peak_ratio:.2f} |")


if __name__ == "__main__":
    main()
