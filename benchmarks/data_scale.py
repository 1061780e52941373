"""How long preparing and validating preference pairs takes, and how much memory, from ten thousand to a million.

python benchmarks/data_scale.py --folder /tmp/scale --rows 10000 100000 1000000

Pairs of about a kilobyte from a vocabulary of made-up words: one pair in fifty is broken, one in a hundred repeats
another. The tokenizer is trained on such words. Each size is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ppo_measures import peak_mib
from rlhf.curves import no_log
from rlhf.data.formats import Row, read_rows, write_rows
from rlhf.models import save_model
from rlhf.params import Params
from rlhf.pretraining import train_tokenizer
from tasks import prepare, validate
from tasks.paths import Paths
from worlds import read_values

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder)))
        return
    print("| pairs | MB | prepare, s | validate, s | pairs per second | peak MiB |\n|" + "---|" * 6)
    for rows in options.rows:
        folder = options.folder / str(rows)
        megabytes = write_pairs(folder / "pairs.jsonl", rows)
        command = [sys.executable, __file__, "--folder", str(folder), "--measure"]
        found = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        )
        speed = rows / (found["prepare"] + found["validate"])
        figures = f"{found['prepare']:.1f} | {found['validate']:.1f} | {speed:,.0f} | {found['peak_mib']:.0f}"
        print(f"| {rows:,} | {megabytes:.0f} | {figures} |", flush=True)


def write_pairs(path: Path, count: int) -> float:
    """A file of `count` pairs; its size in megabytes."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnoprstuvw", k=generator.randint(2, 9))) for _ in range(5000)]

    def text(length: int) -> str:
        return " ".join(generator.choices(words, k=length))

    def pairs() -> Iterator[Row]:
        last: Row = {}
        for number in range(count):
            row = {"prompt": text(20), "chosen": text(generator.randint(40, 90)), "rejected": text(65)}
            if number % 50 == 7:
                row["rejected"] = row["chosen"]
            last = last if number % 100 == 30 else row
            yield last

    write_rows(path, pairs())
    return path.stat().st_size / 1e6


def measure(folder: Path) -> dict[str, float]:
    """Both stages in this process: seconds of each, and the greatest memory."""
    values: dict[str, Any] = read_values(ROOT / "params.yaml", 0)
    source = {"kind": "file", "path": "pairs.jsonl", "shape": "canonical", "columns": {}, "test_share": 0.02}
    few = {**source, "path": "few.jsonl", "limit": None}
    values["prepare"] |= {"base_model": str(folder / "base"), "world": None}
    values["prepare"]["data"] |= {
        "sft": {**few, "columns": {"completion": "chosen"}},
        "preferences": {**source, "limit": None},
        "ratings": None,
        "prompts": few,
    }
    values["validate"] |= {"max_prompt_tokens": 400, "max_completion_tokens": 800}
    with (folder / "pairs.jsonl").open("rb") as file:
        (folder / "few.jsonl").write_bytes(b"".join(islice(file, 200)))
    save_base(folder)
    params, paths = Params.model_validate(values), Paths(folder)
    seconds: dict[str, float] = {}
    for stage in (prepare, validate):
        began = time.perf_counter()
        stage.run(params, paths, no_log)
        seconds[stage.__name__.rpartition(".")[2]] = time.perf_counter() - began
    return {**seconds, "peak_mib": peak_mib()}


def save_base(folder: Path) -> None:
    """A tokenizer that knows the words of the first rows, and the smallest model to go with it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = [row["prompt"] + row["chosen"] for row in read_rows(folder / "few.jsonl")]
    tokenizer = train_tokenizer(texts, 4000, 2048)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    save_model(LlamaForCausalLM(config), tokenizer, folder / "base")


if __name__ == "__main__":
    main()
