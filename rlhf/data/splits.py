"""Hold-outs: whole prompts, on the same side in every kind of data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlhf.data.formats import SPLITS, Row, row_line
from rlhf.data.sources import AS_THEY_ARE, Kind, Treatment, load_source
from rlhf.errors import UserError
from rlhf.params import FileSource, HubSource


def prepare_source(
    source: FileSource | HubSource,
    kind: Kind,
    root: Path,
    seed: int,
    folder: Path,
    treatment: Treatment = AS_THEY_ARE,
) -> dict[str, int]:
    """Write the training and held-out rows of a source, with ids, in the order of the file; rows by split.

    The files are `train.jsonl` and `test.jsonl` in `folder`. Raises UserError as `load_source` and
    `split_by_prompt` do.
    """
    rows = tqdm(load_source(source, kind, root, treatment), desc=f"preparing {kind}", unit="row", delay=1)
    return split_by_prompt(rows, kind, source.test_share, seed, folder)


def split_by_prompt(rows: Iterable[Row], kind: Kind, test_share: float, seed: int, folder: Path) -> dict[str, int]:
    """Write `train.jsonl` and `test.jsonl`; all rows of one prompt are on one side. Returns the rows of each.

    A prompt is held out when its hash falls below `test_share`, so its side depends on the prompt and the
    seed alone and is the same in demonstrations, preferences and prompts. Where the draw leaves a side
    empty though `test_share` is neither 0 nor 1, the prompt nearest to the threshold moves over; `rows` are then gone
    through twice.
    Raises UserError when there is a single prompt to share between two sides.
    """
    counts, least, most = _write_sides(rows, test_share, seed, folder)
    if not 0 < test_share < 1 or all(counts.values()):
        return counts
    if least == most:
        raise UserError(
            f"prepare.data.{kind}: all {sum(counts.values())} rows have the same prompt, so test_share {test_share} "
            "cannot hold any out; set it to 0 or 1, or add rows with other prompts"
        )
    threshold = most if counts["test"] else math.nextafter(least, 1)
    return _write_sides(rows, threshold, seed, folder)[0]


def _write_sides(rows: Iterable[Row], threshold: float, seed: int, folder: Path) -> tuple[dict[str, int], float, float]:
    """Rows by split, and the least and the greatest draw."""
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    least, most = 1.0, 0.0
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "test.jsonl").open("w", encoding="utf-8") as test,
    ):
        for row in rows:
            draw = _draw(json.dumps(row.get("prompt"), sort_keys=True, ensure_ascii=False), seed)
            least, most = min(least, draw), max(most, draw)
            is_held_out = draw < threshold
            (test if is_held_out else train).write(row_line(row))
            counts["test" if is_held_out else "train"] += 1
    return counts, least, most


def _draw(prompt: Any, seed: int) -> float:
    """A number in [0, 1) from the seed and the prompt."""
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode("utf-8", "surrogatepass")).digest()
    # 53 bits fit a float exactly, so that the largest draw stays below 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
