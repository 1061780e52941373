"""Hold-outs: whole prompts, on the same side in every kind of data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf.data.formats import Row
from rlhf.data.sources import Kind, load_source
from rlhf.errors import UserError
from rlhf.params import FileSource, HubSource


def prepare_source(source: FileSource | HubSource, kind: Kind, root: Path, seed: int) -> tuple[list[Row], list[Row]]:
    """The training and held-out rows of a source, with ids, in the order of the file.

    Raises UserError as `load_source` and `split_by_prompt` do.
    """
    rows = load_source(source, kind, root)
    try:
        return split_by_prompt(rows, source.test_share, seed)
    except UserError as error:
        raise UserError(f"prepare.data.{kind}: {error}") from None


def split_by_prompt(rows: list[Row], test_share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; all rows of one prompt are on one side.

    A prompt is held out when its hash falls below `test_share`, so its side depends on the prompt and the
    seed alone and is the same in demonstrations, preferences and prompts. Where the draw leaves a side
    empty though `test_share` is neither 0 nor 1, the prompt nearest to the threshold moves over.
    Raises UserError when there is a single prompt to share between two sides.
    """
    prompts = [json.dumps(row.get("prompt"), sort_keys=True, ensure_ascii=False) for row in rows]
    draws = {prompt: _draw(prompt, seed) for prompt in dict.fromkeys(prompts)}
    held_out = {prompt for prompt, draw in draws.items() if draw < test_share}
    if 0 < test_share < 1:
        if len(draws) < 2:
            raise UserError(
                f"all {len(rows)} rows have the same prompt, so test_share {test_share} cannot hold any out; "
                "set it to 0 or 1, or add rows with other prompts"
            )
        ordered = sorted(draws, key=lambda prompt: draws[prompt])
        held_out = held_out or {ordered[0]}
        held_out = held_out - {ordered[-1]} if len(held_out) == len(ordered) else held_out
    train = [row for row, prompt in zip(rows, prompts, strict=True) if prompt not in held_out]
    test = [row for row, prompt in zip(rows, prompts, strict=True) if prompt in held_out]
    return train, test


def _draw(prompt: Any, seed: int) -> float:
    """A number in [0, 1) from the seed and the prompt."""
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode("utf-8", "surrogatepass")).digest()
    # 53 bits fit a float exactly, so that the largest draw stays below 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
