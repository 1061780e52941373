"""Training stages under a launcher: results as ever, one set of books, and the stage's own sentence at the end."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from ruamel.yaml import YAML

from rlhf.policies import PolicyFiles
from tasks.__main__ import main
from tasks.launch import LAUNCHER, FollowerPaths
from tasks.paths import EXPERIMENT, Paths

ROOT = Path(__file__).parent.parent
TORCHRUN = "torchrun --standalone --nproc-per-node 2"


@pytest.fixture
def root(tmp_path: Path, policy_files: PolicyFiles) -> Path:
    """A workspace in which the policy `ppo` can be trained in seconds."""
    shutil.copytree(policy_files.sft, tmp_path / "models" / "sft")
    shutil.copytree(policy_files.reward, tmp_path / "models" / "reward")
    for kind, source in {"prompts": policy_files.prompts, "preferences": policy_files.preferences}.items():
        for split in ("train", "test"):
            target = tmp_path / "data" / "validated" / kind / f"{split}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    yaml = YAML()
    values = yaml.load((ROOT / "params.yaml").read_text())
    values["policies"] = {"ppo": values["policies"]["ppo"]}
    values["policies"]["ppo"] |= {"steps": 3, "batch_size": 8, "minibatches": 2, "max_new_tokens": 6}
    values["evaluate"]["watch"] = {"evaluations": 2, "prompts": 4, "on_over_optimisation": "warn"}
    values["evaluate"]["prompts"] = 4
    yaml.dump(values, tmp_path / "params.yaml")
    return tmp_path


def run_stage(root: Path, *arguments: str, launcher: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != LAUNCHER}
    environment |= {"DVC_ROOT": str(root), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment |= {LAUNCHER: launcher} if launcher else {}
    return subprocess.run(
        [sys.executable, "-m", "tasks", *arguments], env=environment, capture_output=True, text=True, check=False
    )


def read_curves(root: Path) -> list[dict[str, float]]:
    with (root / "reports" / "policy" / "ppo" / "curves.csv").open() as file:
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]


def test_a_policy_of_two_processes_is_that_of_one_and_is_tracked_once(root: Path) -> None:
    curves = []
    for launcher in (None, TORCHRUN):
        done = run_stage(root, "policy", "ppo", launcher=launcher)
        assert done.returncode == 0, done.stderr[-3000:]
        curves.append(read_curves(root))
        assert (root / "models" / "policy" / "ppo" / "model.safetensors").exists()
    assert len(curves[0]) == len(curves[1]) == 4
    for one, two in zip(*curves, strict=True):
        assert two == pytest.approx(one, abs=1e-3, rel=1e-2, nan_ok=True)
    assert done.stderr.count("is kept, the best of 3 looks") == 1, "one process speaks"
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlruns' / 'mlflow.db'}")
    runs = mlflow.search_runs(experiment_names=[EXPERIMENT], output_format="list")
    assert [tag for run in runs if (tag := run.data.tags.get("alignflow.processes"))] == ["2"]


def test_the_last_line_is_the_stages_own_sentence(root: Path) -> None:
    done = run_stage(root, "policy", "pro", launcher=TORCHRUN)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("'pro' is not one of the policies of the params file")


def test_a_launcher_that_does_not_exist_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setenv(LAUNCHER, "no-such-launcher --processes 2")
    assert main(["policy", "ppo"]) == 1
    [sentence] = capsys.readouterr().err.splitlines()
    assert "ALIGNFLOW_LAUNCHER is 'no-such-launcher --processes 2', which cannot be run" in sentence


def test_told_to_stop_the_launcher_stops_its_processes(root: Path) -> None:
    waiting = root / "waits.sh"
    waiting.write_text("#!/bin/sh\necho $$\nexec tail -f /dev/null\n")
    waiting.chmod(0o755)
    environment = {**os.environ, "DVC_ROOT": str(root), "PYTHONPATH": str(ROOT), LAUNCHER: str(waiting)}
    command = [sys.executable, "-m", "tasks", "policy", "ppo"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_a_follower_writes_reports_elsewhere_and_reads_where_all_do(tmp_path: Path) -> None:
    paths = FollowerPaths(tmp_path, "policy", tmp_path / "scratch")
    whole = Paths(tmp_path)
    assert paths.report("policy", "ppo") == tmp_path / "scratch" / "reports" / "policy" / "ppo"
    assert paths.metrics("policy", "ppo") == tmp_path / "scratch" / "metrics" / "policy" / "ppo.json"
    assert paths.report("sft") == whole.report("sft")
    assert paths.model("policy", "ppo") == whole.model("policy", "ppo")


def test_stages_that_do_not_train_are_not_launched(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setenv(LAUNCHER, "no-such-launcher")
    assert main(["validate", "name"]) == 1
    assert "the stage validate takes no name" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [["sft"], ["reward"], ["policy", "ppo"]])
def test_a_launcher_that_splits_the_weights_is_refused_before_training(
    root: Path, stage: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"DVC_ROOT": str(root), "RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    assert main(stage) == 1
    [sentence] = capsys.readouterr().err.splitlines()
    assert "the launcher asks for FSDP, but each process has to hold the whole model" in sentence
    assert not (root / "mlruns").exists(), "no run was begun"
