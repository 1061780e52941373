"""Where a run comes from: the stage's files and their DVC hashes, the git state, the params and the flow."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf.params import Params

FLOW_RUN = "ALIGNFLOW_FLOW_RUN_ID"
PARENT_KEY = "ALIGNFLOW_PARENT_RUN"
PARENT_NAME = "ALIGNFLOW_PARENT_NAME"


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml; `item` is the policy's name where the stage is one of many."""

    name: str
    item: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name}@{self.item}" if self.item else self.name


@dataclass(frozen=True)
class Group:
    """What one row of MLflow's table stands for: a flow run, an experiment of DVC, or a state of the repository."""

    key: str
    name: str


def stage_files(root: Path, stage: Stage) -> tuple[list[str], list[str]]:
    """Inputs and outputs of a stage as dvc.yaml lists them; nothing where there is no such stage."""
    path = root / "dvc.yaml"
    stages = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["stages"] if path.exists() else {}
    described = stages.get(stage.name, {})
    described = described.get("do", described)
    inputs = _names(described.get("deps", []), stage)
    outputs = [name for kind in ("outs", "metrics", "plots") for name in _names(described.get(kind, []), stage)]
    return inputs, outputs


def _names(entries: list[Any], stage: Stage) -> list[str]:
    names = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]
    filled = [name.replace("${key}", stage.item or "").replace("${item}", stage.item or "") for name in names]
    return [name.rstrip("/") for name in filled if "${" not in name]


def hash_path(path: Path) -> str:
    """The MD5 by which DVC knows a file or a folder (`….dir`). Raises FileNotFoundError."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    found = (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    entries = sorted((file.relative_to(path).as_posix(), file) for file in found)
    listing = [{"md5": hash_path(file), "relpath": name} for name, file in entries]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def hash_paths(root: Path, names: list[str]) -> dict[str, str]:
    """The hash of each path below `root` that exists."""
    return {name: hash_path(root / name) for name in names if (root / name).exists()}


def locked_hashes(root: Path, stage: Stage) -> dict[str, str]:
    """The hashes that dvc.lock holds for a stage's inputs and outputs; nothing where DVC has not run it."""
    path = root / "dvc.lock"
    if not path.exists():
        return {}
    stages = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")).get("stages", {})
    described = stages.get(stage.label, {})
    return {
        entry["path"]: entry["md5"] for kind in ("deps", "outs") for entry in described.get(kind, []) if "md5" in entry
    }


def flatten(values: Mapping[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Nested maps as one, keys joined: `{"sft": {"epochs": 1}}` → `{"sft.epochs": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{separator}{key}" if prefix else str(key)
        flat |= flatten(value, name, separator) if isinstance(value, Mapping) else {name: value}
    return flat


def flat_params(params: Params) -> dict[str, str]:
    """Every value of params.yaml under its dotted key."""
    flat = flatten(params.model_dump(by_alias=True, mode="json", exclude_unset=True))
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}


def stage_params(params: Params, stage: Stage) -> dict[str, str]:
    """The values a stage reads: its section, and what all of them share."""
    section = f"policies.{stage.item}." if stage.name == "policy" else f"{stage.name}."
    flat = flat_params(params).items()
    return {key: value for key, value in flat if key == "seed" or key.startswith((section, "ledger."))}


def params_hash(params: Params) -> str:
    """Sixteen hexadecimal digits that stand for all of params.yaml."""
    return hashlib.sha256(json.dumps(flat_params(params), sort_keys=True).encode()).hexdigest()[:16]


def git_tags(root: Path) -> dict[str, str]:
    """Commit and whether tracked files differ from it; a single tag that says so where there is no repository."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"alignflow.git_commit": "none"}
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock", ":!metrics")
    return {
        "mlflow.source.git.commit": commit,
        "alignflow.git_commit": commit,
        "alignflow.git_dirty": str(bool(changes)).lower(),
    }


def _git(root: Path, *words: str) -> str | None:
    try:
        answer = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def validation_tags(root: Path) -> dict[str, str]:
    """Whether the data passed its gate, and the hash of the result that says so."""
    path = root / "metrics" / "validate.json"
    if not path.exists():
        return {}
    result = json.loads(path.read_text(encoding="utf-8"))
    passed = result.get("success") if isinstance(result, dict) else None
    return {"alignflow.validation": hash_path(path), "alignflow.validation_success": str(passed).lower()}


def health_tags(report: Path) -> dict[str, str]:
    """The verdict of the health rules on a training's curves, and what each rule that is not content found."""
    path = report / "health.json"
    if not path.exists():
        return {}
    health = json.loads(path.read_text(encoding="utf-8"))
    loud = [found for found in health["findings"] if found["verdict"] != "ok"]
    rules = {f"alignflow.health.{found['rule']}": f"{found['verdict']}; {found['finding']}" for found in loud}
    return {"alignflow.health": health["verdict"]} | rules


def environment_tags() -> dict[str, str]:
    """What the flow and DVC say about themselves."""
    names = {
        "alignflow.flow_run": FLOW_RUN,
        "dvc.stage": "DVC_STAGE",
        "dvc.exp_name": "DVC_EXP_NAME",
        "dvc.exp_baseline_rev": "DVC_EXP_BASELINE_REV",
        "alignflow.processes": "WORLD_SIZE",
    }
    return {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}


def flow_environment(flow_run_id: str, name: str) -> dict[str, str]:
    """What a flow puts into its stages' environment so that their runs stand under one row with its name."""
    return {FLOW_RUN: flow_run_id, PARENT_KEY: f"flow-{flow_run_id}", PARENT_NAME: name}


def run_group(root: Path, params: Params) -> Group:
    """The row a stage's run belongs to: the flow's, else the DVC experiment's, else that of commit and params."""
    if key := os.environ.get(PARENT_KEY):
        return Group(key, os.environ.get(PARENT_NAME) or key)
    if experiment := os.environ.get("DVC_EXP_NAME"):
        return Group(f"exp-{experiment}-{os.environ.get('DVC_EXP_BASELINE_REV', '')[:8]}", experiment)
    commit = (_git(root, "rev-parse", "HEAD") or "nogit")[:8]
    return Group(f"repro-{commit}-{params_hash(params)}", f"{commit} {params_hash(params)[:8]}")
