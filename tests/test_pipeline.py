"""The real pipeline in a copy of the repository, with real DVC and stages that train for a second."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.health import BROKEN, VERDICTS
from rlhf.params_file import load_params
from tests.tiny import ROOT, change_params, tiny_params, write_params

pytestmark = pytest.mark.xdist_group("pipeline")  # the run they all start from is made by one process, once
POLICIES = ("dpo", "grpo", "ppo")
BEFORE = ["prepare", "validate", "sft", "embed", "reward", "probe"]
STAGES = [*BEFORE, *(f"policy@{name}" for name in POLICIES), "evaluate"]
CONTRACT = {
    "gold_reward",
    "proxy_reward",
    "kl_to_sft",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "mean_tokens",
    "stop_rate",
}


class Clone:
    """A working copy, and commands in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "ALIGNFLOW_", "MLFLOW_"))
        }
        self._environment = inherited | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@example.org",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@example.org",
            "DVC_SITE_CACHE_DIR": str(root.parent / "dvc-site"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(self, *command: str, status: int = 0) -> str:
        """What the command prints; its exit status must be the expected one."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout[-4000:]
        return done.stdout

    def dvc(self, *words: str, status: int = 0) -> str:
        return self.run(sys.executable, "-m", "dvc", *words, status=status)

    def repro(self, *words: str, status: int = 0) -> list[str]:
        """The stages whose commands `dvc repro` ran."""
        return re.findall(r"^Running stage '(.*)':$", self.dvc("repro", *words, status=status), re.MULTILINE)

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", "state")

    def metrics(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / "metrics" / f"{name}.json").read_text(encoding="utf-8"))

    def hashes(self, *tops: str) -> dict[str, bytes]:
        """The content of every file below some folders."""
        files = (path for top in tops for path in sorted((self.root / top).rglob("*")) if path.is_file())
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in files}


def _copy_repository(root: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if name.startswith(("metrics/", "tests/", "docs/")) or name == "dvc.lock" or not (ROOT / name).is_file():
            continue
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which the whole pipeline has run once; a test that changes it puts it back."""
    clone = Clone(tmp_path_factory.mktemp("pipeline") / "clone")
    clone.root.mkdir()
    _copy_repository(clone.root)
    write_params(clone.root / "params.yaml", tiny_params())
    clone.run("git", "init", "--quiet")
    clone.commit()
    assert clone.repro() == STAGES
    clone.commit()
    return clone


def test_metrics_keep_their_contract(pipeline: Clone) -> None:
    figures = pipeline.metrics("evaluate")
    assert set(figures) == {"sft", *POLICIES}
    for name, values in figures.items():
        assert set(values) >= CONTRACT, name
    assert set(pipeline.metrics("reward")) >= {"accuracy", "auroc", "noise_rate_estimated", "length_only_accuracy"}


@pytest.mark.parametrize("name", ["sft", "reward", *(f"policy/{name}" for name in POLICIES)])
def test_every_training_leaves_its_health(pipeline: Clone, name: str) -> None:
    health = json.loads((pipeline.root / "reports" / name / "health.json").read_text(encoding="utf-8"))
    assert pipeline.metrics(name)["health"] == VERDICTS.index(health["verdict"])
    assert {found["rule"] for found in health["findings"]} | set(health["silent"]) >= {"no gradient"}
    logged = (pipeline.root / "reports" / name / "curves.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    heard = {curve for found in health["findings"] for curve in found["curves"]} - {BROKEN}
    assert heard and heard <= set(logged)
    if name == "reward":
        assert heard >= {"held_out_accuracy", "grad_norm"}


def test_everything_is_in_git_or_in_dvc(pipeline: Clone) -> None:
    assert pipeline.run("git", "status", "--porcelain") == ""
    untracked = pipeline.run("git", "ls-files", "--others", "--directory", "--exclude-standard")
    assert untracked == ""


def test_a_second_repro_runs_nothing(pipeline: Clone) -> None:
    assert pipeline.repro() == []
    assert json.loads(pipeline.dvc("status", "--json")) == {}


def test_outputs_hold_no_path_of_this_machine_and_no_pickle(pipeline: Clone) -> None:
    for name, content in pipeline.hashes("models", "metrics", "reports", "data").items():
        assert str(pipeline.root).encode() not in content, name
        assert not name.endswith((".bin", ".pt", ".pkl")), name


def test_one_value_changed_runs_exactly_its_descendants(pipeline: Clone) -> None:
    """As an experiment: DVC compares it with the committed state."""
    said = pipeline.dvc("exp", "run", "--name", "soft", "--set-param", "policies.dpo.beta=0.3")
    try:
        assert re.findall(r"^Running stage '(.*)':$", said, re.MULTILINE) == ["policy@dpo", "evaluate"]
        changed = json.loads(pipeline.dvc("params", "diff", "--json"))["params.yaml"]["policies.dpo.beta"]
        before = load_params(ROOT / "params.yaml").policies["dpo"].beta
        assert (changed["old"], changed["new"]) == (before, 0.3)
        assert "metrics/policy/dpo.json" in pipeline.dvc("metrics", "diff", "--json")
    finally:
        pipeline.run("git", "checkout", "--quiet", "--force", "HEAD")
        pipeline.dvc("checkout")
    assert pipeline.repro() == []


def test_another_probe_retrains_no_policy_and_one_that_stops_lets_none_begin(pipeline: Clone) -> None:
    policies = [f"policy@{name}" for name in POLICIES]
    models = pipeline.hashes("models/policy")

    def refuse_everything(params: dict[str, Any]) -> None:
        nothing = {"warn": 0.0, "stop": 0.0}
        params["probe"] |= {"on_hackable": "stop", "wins": nothing, "gain": nothing}

    change_params(pipeline.root / "params.yaml", lambda params: params["probe"].update(rows=12))
    try:
        assert pipeline.repro(*policies) == ["probe"]
        change_params(pipeline.root / "params.yaml", refuse_everything)
        assert pipeline.repro(status=255) == ["probe"]
        assert "stop" in (pipeline.root / "reports" / "probe" / "tricks.csv").read_text(encoding="utf-8")
        assert pipeline.hashes("models/policy") == models
    finally:
        pipeline.run("git", "checkout", "--quiet", "--force", "HEAD")
        pipeline.dvc("checkout", "--force")
    assert pipeline.repro() == []


def test_a_new_policy_is_a_new_key(pipeline: Clone) -> None:
    def add(params: dict[str, Any]) -> None:
        params["policies"]["ipo"] = params["policies"]["dpo"] | {"loss": "ipo"}

    change_params(pipeline.root / "params.yaml", add)
    try:
        assert pipeline.repro() == ["policy@ipo", "evaluate"]
        assert "ipo" in pipeline.metrics("evaluate")
    finally:
        pipeline.run("git", "checkout", "--quiet", "--force", "HEAD")
        pipeline.run("git", "clean", "--quiet", "--force", "-d", "metrics")
        shutil.rmtree(pipeline.root / "models" / "policy" / "ipo")
        shutil.rmtree(pipeline.root / "reports" / "policy" / "ipo")
        pipeline.dvc("checkout")
    assert pipeline.repro() == []


def test_corrupt_rows_stop_validate_and_nothing_behind_it_runs(pipeline: Clone) -> None:
    source = pipeline.root / "data" / "prepared" / "preferences" / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    broken = [{"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["chosen"]} for row in rows]
    raw = pipeline.root / "data" / "raw" / "pairs.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in broken), encoding="utf-8")
    models = pipeline.hashes("models/sft", "models/reward", "models/policy")

    def read_file(params: dict[str, Any]) -> None:
        described = {"kind": "file", "path": "data/raw/pairs.jsonl", "shape": "canonical", "columns": {}}
        params["prepare"]["data"]["preferences"] = described | {"test_share": 0.2, "limit": None}

    change_params(pipeline.root / "params.yaml", read_file)
    try:
        assert pipeline.repro(status=255) == ["prepare", "validate"]
        quarantined = (
            (pipeline.root / "data" / "quarantine" / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
        )
        assert {"id", "reason", "split"} <= set(json.loads(quarantined[0]))
        assert pipeline.hashes("models/sft", "models/reward", "models/policy") == models
    finally:
        raw.unlink()
        pipeline.run("git", "checkout", "--quiet", "--force", "HEAD")
        pipeline.dvc("checkout", "--force")
    assert pipeline.repro() == []


def test_push_and_pull_bring_a_clean_clone_up_to_date(pipeline: Clone, tmp_path: Path) -> None:
    pipeline.dvc("remote", "add", "--local", "store", str(tmp_path / "store"))
    pipeline.dvc("push", "--remote", "store")
    clone = Clone(tmp_path / "clone")
    subprocess.run(["git", "clone", "--quiet", str(pipeline.root), str(clone.root)], check=True)
    clone.dvc("remote", "add", "--local", "store", str(tmp_path / "store"))
    clone.dvc("pull", "--remote", "store")
    assert clone.repro() == []
    assert clone.hashes("models", "data", "metrics") == pipeline.hashes("models", "data", "metrics")


def test_a_clean_clone_makes_the_same_bytes(pipeline: Clone, tmp_path: Path) -> None:
    clone = Clone(tmp_path / "elsewhere" / "clone")
    clone.root.parent.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(pipeline.root), str(clone.root)], check=True)
    assert clone.repro() == STAGES
    ours, theirs = (one.hashes("models", "data/prepared", "data/validated", "metrics") for one in (clone, pipeline))
    assert [name for name in theirs if ours.get(name) != theirs[name]] == []
