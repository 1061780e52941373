"""Embedded worlds that several benchmarks train in: a params file with another seed, and the stages before policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf.curves import no_log
from rlhf.params import Params
from tasks import embed, prepare, probe, reward, sft, validate
from tasks.paths import Paths


def read_values(path: Path, seed: int) -> dict[str, Any]:
    """The values of a params file under another seed, to be changed before they are checked."""
    values: dict[str, Any] = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    return values | {"seed": seed}


def prepare_world(params: Params, paths: Paths) -> None:
    """Run the stages before the policies, those whose metrics are not there yet."""
    for stage in (prepare, validate, sft, embed, reward, probe):
        name = stage.__name__.rpartition(".")[2]
        if not paths.metrics(name).exists():
            stage.run(params, paths, no_log)
