"""`python -m tasks`: refuses before anything heavy is imported, explains every failure in a sentence."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import tasks.__main__ as command
from rlhf.curves import Spoken
from rlhf.errors import UserError
from rlhf.params_file import load_params
from tasks.paths import Paths

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "mlflow",
    "prefect",
    "pandas",
    "great_expectations",
    "datasets",
    "dvc",
    "numpy",
}


def _write_params(folder: Path, sft: dict[str, Any]) -> None:
    """The repository's params with `dpo` as the only policy and some values of `sft` others."""
    raw = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    raw["policies"] = {"dpo": raw["policies"]["dpo"]}
    raw["sft"] |= sft
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(raw, file)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty workspace in which stages run and nothing is recorded."""
    _write_params(tmp_path, {})
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command, "tracked_run", Untracked)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


class Untracked:
    """Stands for `tracked_run` where the record is not what is tested."""

    def __init__(self, stage: Any, params: Any, paths: Any) -> None:
        self.stage = stage

    def __enter__(self) -> Any:
        return lambda metrics, step: None

    def __exit__(self, *_: object) -> None:
        return None


def _replace_stage(monkeypatch: pytest.MonkeyPatch, name: str, run: Any) -> None:
    module = types.ModuleType(f"tasks.{name}")
    module.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, f"tasks.{name}", module)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_sice": 2}, "sft.batch_sice"),
        ({"learning_rate": -1.0}, "sft.learning_rate is -1.0"),
        ({"epochs": "three"}, "sft.epochs is 'three'"),
    ],
)
def test_wrong_params_are_refused_before_anything_heavy_is_imported(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    _write_params(tmp_path, change)
    script = (
        "import sys, json; from tasks.__main__ import main; status = main(['sft']);"
        "print(json.dumps([status, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    environment = os.environ | {"DVC_ROOT": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    status, imported = json.loads(done.stdout)
    assert status == 1
    assert HEAVY.isdisjoint(imported)
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".alignflow").exists(), "a run that never began is not recorded"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["policy"], "no name is given, which must be one of the policies of the params file; take one of dpo"),
        (["policy", "ppo"], "'ppo' is not one of the policies of the params file; take one of dpo"),
        (["sft", "dpo"], "the stage sft takes no name but was given 'dpo'; leave it out"),
        (["sft", "--params", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_wrong_arguments(
    workspace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert command.main(arguments) == 1
    assert sentence in capsys.readouterr().err


def test_a_stage_gets_params_paths_log_and_its_name(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    _replace_stage(monkeypatch, "policy", lambda *arguments: calls.append(arguments))
    _replace_stage(monkeypatch, "sft", lambda *arguments: calls.append(arguments))
    assert command.main(["policy", "dpo"]) == 0
    assert command.main(["sft"]) == 0
    (params, paths, log, name), short = calls
    assert params == load_params(workspace / "params.yaml")
    assert paths == Paths(workspace)
    assert name == "dpo"
    assert log({"loss": 1.0}, 0) is None
    assert len(short) == 3


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (UserError("data.jsonl line 3: no prompt; add one"), ["data.jsonl line 3: no prompt; add one"]),
        (
            OSError(errno.ENOSPC, "No space left on device", "models/sft/x"),
            ["the disk is full: models/sft/x", "bytes are free"],
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), ["the disk is full"]),
        (ModuleNotFoundError("no", name="bitsandbytes"), ["bitsandbytes", "alignflow[gpu]"]),
        (ModuleNotFoundError("no", name="trl.trainer"), ["the package trl is not installed", "make setup"]),
        (MemoryError(), ["out of memory", "batch_size"]),
        (ValueError("bad shape\nand more"), ["ValueError", "bad shape;", "--debug"]),
    ],
)
def test_every_failure_is_a_sentence(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    parts: list[str],
) -> None:
    def fail(*_: Any) -> None:
        raise error

    _replace_stage(monkeypatch, "sft", fail)
    assert command.main(["sft"]) == 1
    printed = capsys.readouterr().err
    assert [part for part in parts if part not in printed] == []
    assert len(printed.strip().splitlines()) == 1


def test_the_cause_behind_a_failure_is_explained(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, "full", "models/x")
        except OSError as error:
            raise RuntimeError("could not save") from error

    _replace_stage(monkeypatch, "sft", fail)
    command.main(["sft"])
    assert "the disk is full: models/x" in capsys.readouterr().err


def test_the_place_is_the_last_line_of_our_own_code() -> None:
    with pytest.raises(AttributeError) as raised:
        load_params(None)  # pyright: ignore[reportArgumentType]  (a programming error on purpose)
    sentence = command.explain(raised.value)
    assert "in rlhf/params_file.py line" in sentence
    assert "(load_sections)" in sentence


def test_debug_shows_the_traceback(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("bad shape")

    _replace_stage(monkeypatch, "sft", fail)
    assert command.main(["sft", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_signals_end_through_every_finally(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[str] = []

    def stop(number: int) -> Any:
        def run(*_: Any) -> None:
            try:
                os.kill(os.getpid(), number)
                signal.pause()
            finally:
                cleaned.append(str(number))

        return run

    _replace_stage(monkeypatch, "sft", stop(signal.SIGINT))
    assert command.main(["sft"]) == 130
    _replace_stage(monkeypatch, "sft", stop(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        command.main(["sft"])
    assert ended.value.code == 143
    assert len(cleaned) == 2


# what a stage says --------------------------------------------------------------------------------


def test_figures_pass_at_every_step_and_the_telling_ones_are_said_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    passed: list[tuple[dict[str, float], int]] = []
    times = iter([0.0, 0.0, 14.0, 15.0, 15.0])
    log = Spoken(lambda metrics, step: passed.append((dict(metrics), step)), 15.0, lambda: next(times))
    figures = {"loss": 0.123456, "odd": 7.0}
    with caplog.at_level(logging.INFO):
        for step in (1, 2, 3):
            log(figures, step)
        log({"odd": 7.0}, 4)
    assert passed == [(figures, 1), (figures, 2), (figures, 3), ({"odd": 7.0}, 4)]
    assert caplog.messages == ["step 1: loss 0.1235", "step 3: loss 0.1235"]


def test_other_packages_are_heard_only_when_they_warn(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # else basicConfig does nothing

    def talk(*_: object) -> None:
        for name in ("great_expectations.data_context", "rlhf.data"):
            logging.getLogger(name).info("%s says something", name)
        logging.getLogger("great_expectations").warning("beware")

    _replace_stage(monkeypatch, "sft", talk)
    assert command.main(["sft"]) == 0
    said = ["INFO rlhf.data: rlhf.data says something", "WARNING great_expectations: beware"]
    assert capsys.readouterr().err.splitlines() == said
