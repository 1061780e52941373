"""Where every stage reads and writes, relative to the repository's root."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ruamel.yaml import YAML

from rlhf.errors import UserError

KINDS: tuple[Literal["sft", "preferences", "ratings", "prompts"], ...] = ("sft", "preferences", "ratings", "prompts")
"""The kinds of data, each a folder with `train.jsonl` and `test.jsonl`."""

EXPERIMENT = "alignflow"
"""Where MLflow keeps the runs."""


@dataclass(frozen=True)
class Paths:
    """The files of one workspace; `root` holds dvc.yaml."""

    root: Path

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def prepared(self) -> Path:
        return self.root / "data" / "prepared"

    @property
    def validated(self) -> Path:
        return self.root / "data" / "validated"

    @property
    def embeddings(self) -> Path:
        return self.root / "data" / "embeddings"

    @property
    def quarantine(self) -> Path:
        return self.root / "data" / "quarantine"

    @property
    def mlruns(self) -> Path:
        return self.root / "mlruns"

    @property
    def state(self) -> Path:
        """Locks, spool and checkpoints: what DVC and git do not track."""
        return self.root / ".alignflow"

    def rows(self, kind: str, split: str) -> Path:
        """The validated rows of one kind (one of KINDS) and split (`train`, `test`)."""
        return self.validated / kind / f"{split}.jsonl"

    def model(self, stage: str, name: str | None = None) -> Path:
        return self.root / "models" / stage / (name or "")

    @property
    def reward_model(self) -> Path | None:
        """models/reward; None where the stage reward left a note instead, for want of preferences."""
        folder = self.model("reward")
        return folder if (folder / "config.json").exists() else None

    def embedder(self, name: str) -> Path | str:
        """The model whose embeddings are used: models/sft, a folder relative to the root, or a hub id."""
        folder = self.model("sft") if name == "sft" else self.root / name
        return folder if name == "sft" or folder.exists() else name

    def checkpoints(self, stage: str, name: str) -> Path:
        """Outside DVC's outputs, which DVC removes before it runs a stage again."""
        return self.state / "checkpoints" / stage / name

    def report(self, stage: str, name: str | None = None) -> Path:
        return self.root / "reports" / stage / (name or "")

    def metrics(self, stage: str, name: str | None = None) -> Path:
        return self.root / "metrics" / (f"{stage}/{name}.json" if name else f"{stage}.json")


def find_root() -> Path:
    """The workspace: DVC_ROOT where DVC runs us, else the nearest folder upwards with a dvc.yaml."""
    if "DVC_ROOT" in os.environ:
        return Path(os.environ["DVC_ROOT"])
    here = Path.cwd().resolve()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").exists()), here)


def refuse_unwatched(paths: Paths, stage: str, key: str, files: Iterable[str]) -> None:
    """Raise UserError where params name a file that DVC does not watch: a change of it would go unnoticed.

    `key` names the params that read the files. Nothing happens where there is no dvc.yaml.
    """
    pipeline = paths.root / "dvc.yaml"
    if not pipeline.exists():
        return
    described = YAML(typ="safe", pure=True).load(pipeline.read_text(encoding="utf-8"))["stages"][stage]
    watched = [(paths.root / dep).resolve() for dep in described.get("do", described)["deps"]]
    for file in files:
        path = (paths.root / file).resolve()
        if path.exists() and not any(path.is_relative_to(dep) for dep in watched):
            raise UserError(
                f"{key} reads {file}, which is no dep of the stage {stage} in dvc.yaml, so that a change would go "
                "unnoticed; put it into rewards/, or add it to those deps"
            )
