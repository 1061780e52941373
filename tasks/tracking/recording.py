"""One stage run as the stage's own process sees it: events go to a journal, a process beside it sends them."""

from __future__ import annotations

import getpass
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rlhf.curves import Log
from rlhf.errors import UserError
from rlhf.params import Params
from tasks.paths import Paths
from tasks.tracking import lineage
from tasks.tracking.lineage import Stage
from tasks.tracking.sampling import SystemSampler
from tasks.tracking.spool import EVENTS, Journal, load_progress
from tasks.tracking.store import tracking_uri

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

FLUSH_SECONDS = 20.0
"""How long a finished stage waits for a server, besides the time its files take to copy."""
LOCAL_SECONDS = 60.0
"""The same for a store on this disk: it cannot hang, only a busy machine makes it slow."""
STOP_SECONDS = 3.0
"""The same for a stage that was told to stop."""
MODEL_STAGES = ("sft", "reward", "policy")
_BYTES_PER_SECOND = 20e6
_LARGEST_ARTIFACT = 50_000_000


@contextmanager
def tracked_run(stage: Stage, params: Params, paths: Paths) -> Iterator[Log]:
    """Record a stage: yields the Log for its curves; what it read and wrote is added around it.

    Nothing that goes wrong with tracking reaches the stage. An exception of the stage ends the run
    as FAILED (KILLED where the stage was told to stop) and goes on.
    """
    recording = _attempt(lambda: Recording(stage, params, paths))
    if recording is None:
        yield lambda _metrics, _step: None
        return
    try:
        yield recording.log
    except BaseException as error:
        status = "KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED"
        sentence = _sentence(error)
        _attempt(recording.write_reports)
        _attempt(lambda: recording.end(status, sentence))
        raise
    _attempt(recording.write_reports)
    _attempt(recording.write_outputs)
    _attempt(lambda: recording.end("FINISHED", None))


def _attempt(action: Callable[[], Result]) -> Result | None:
    """Run something of the tracking; telemetry must never kill a training, so any failure is a warning."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - the reason is the docstring
        logger.warning("MLflow tracking: %s: %s; the stage goes on", type(error).__name__, error)
        return None


def _sentence(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return (text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")[:2000]


class Recording:
    """A run that is being written down."""

    def __init__(self, stage: Stage, params: Params, paths: Paths) -> None:
        self._stage, self._paths = stage, paths
        self._started = time.time()
        self._last_step: dict[str, int] = {}
        self._bytes = 0
        self._broken = False
        self._inputs, self._outputs = lineage.stage_files(paths.root, stage)
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self._started))
        key = f"{moment}-{stage.label.replace('@', '-')}-{os.getpid()}-{time.monotonic_ns() % 1_000_000}"
        self._journal = Journal(paths.state / "spool" / key)
        self._write_start(params)
        self._write_datasets()
        self._warned = False
        self._sender = self._start_sender()
        self._sampler = SystemSampler(self._write_metrics, self._warn_early)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """The stage's curves, under the stage's name: `loss` → `sft/loss`."""
        self._write_metrics({f"{self._stage.name}/{name}": value for name, value in metrics.items()}, step)

    def write_reports(self) -> None:
        """Final metrics, figures and sample answers, as far as this run wrote them."""
        name, item = self._stage.name, self._stage.item
        if self._is_fresh(self._paths.metrics(name, item)):
            figures = lineage.flatten(
                json.loads(self._paths.metrics(name, item).read_text(encoding="utf-8")), separator="/"
            )
            for key, value in _numbers({f"{name}/{key}": value for key, value in figures.items()}).items():
                # Behind the curve of the same name, so that the figure and not a point of the curve is the latest.
                self._write_metrics({key: value}, self._last_step.get(key, 0))
            prefix = f"{name}/{item}" if item else name
            values = _numbers({f"{prefix}/{key}": value for key, value in figures.items()})
            self._write("parent_metrics", {"values": values})
        folder = self._paths.report(name, item)
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            if path.is_file() and self._is_fresh(path):
                self._write_report(path, folder)
        if self._is_fresh(folder / "health.json"):
            self._write("tags", {"values": lineage.health_tags(folder)})
        if name != "prepare":
            self._write("tags", {"values": lineage.validation_tags(self._paths.root)})

    def write_outputs(self) -> None:
        """The hashes of what the stage wrote, and its models."""
        own = self._paths.model(self._stage.name, self._stage.item).relative_to(self._paths.root)
        hashes = lineage.hash_paths(self._paths.root, sorted({*self._outputs, str(own)}))
        self._write("tags", {"values": {f"output/{path}": md5 for path, md5 in hashes.items()}})
        for path, md5 in hashes.items():
            folder = self._paths.root / path
            if self._stage.name not in MODEL_STAGES or not (folder / "config.json").exists():
                continue  # the base model is data that came from elsewhere
            self._bytes += sum(file.stat().st_size for file in folder.rglob("*"))
            name = "model" if path == str(own) else folder.name
            self._write("model", {"path": path, "md5": md5, "name": name})

    def end(self, status: str, error: str | None) -> None:
        """Write the end and wait, within bounds, until MLflow has everything."""
        self._sampler.stop()
        self._write("end", {"status": status, "error": error})
        self._journal.close()
        patience = self._patience(status)
        if self._sender.stdin is not None:
            self._sender.stdin.close()  # tells the sender that nothing more comes
        try:
            self._sender.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also where a second Ctrl-C ends the wait: no process is left behind.
            self._sender.kill()
            self._sender.wait()
        if (self._journal.folder / EVENTS).exists() and not self._warned:
            self._warn(load_progress(self._journal.folder).error or f"no answer within {patience:.0f} s")

    def _patience(self, status: str) -> float:
        if status == "KILLED":
            return STOP_SECONDS
        seconds = LOCAL_SECONDS if tracking_uri(self._paths).startswith("sqlite:") else FLUSH_SECONDS
        return seconds + self._bytes / _BYTES_PER_SECOND

    def _write_start(self, params: Params) -> None:
        root = self._paths.root
        hashes = lineage.hash_paths(root, self._inputs)
        tags = {
            "alignflow.stage": self._stage.label,
            "alignflow.kind": "stage",
            "alignflow.params_hash": lineage.params_hash(params),
            "mlflow.user": getpass.getuser(),
            "mlflow.source.name": f"python -m tasks {' '.join(filter(None, (self._stage.name, self._stage.item)))}",
            "mlflow.source.type": "LOCAL",
            **({"alignflow.policy": self._stage.item} if self._stage.item else {}),
            **lineage.git_tags(root),
            **lineage.environment_tags(),
        }
        group = lineage.run_group(root, params)
        own = lineage.stage_params(params, self._stage)
        self._journal.write(
            "start",
            {"name": self._stage.label, "group": {"key": group.key, "name": group.name}, "tags": tags, "params": own},
        )
        self._journal.write("parent_params", {"values": lineage.flat_params(params)})
        self._journal.write("tags", {"values": {f"input/{path}": md5 for path, md5 in hashes.items()}})
        models = [md5 for path, md5 in hashes.items() if path.startswith("models/")]
        self._journal.write("parent_models", {"md5s": models})

    def _write_datasets(self) -> None:
        """Every data file the stage reads, by its digest."""
        for name in self._inputs:
            path = self._paths.root / name
            files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
            for file in files if name.startswith("data/") else []:
                if not file.exists() or not (size := file.stat().st_size):
                    continue
                context = "evaluation" if file.stem == "test" else "training"
                relative = file.relative_to(self._paths.root).as_posix()
                fields = {"name": relative, "digest": lineage.hash_path(file), "bytes": size, "context": context}
                self._journal.write("dataset", fields)

    def _write_report(self, path: Path, folder: Path) -> None:
        size = path.stat().st_size
        if size > _LARGEST_ARTIFACT:
            logger.warning("%s has %d MB and stays out of MLflow", path, size // 1_000_000)
            return
        self._bytes += size
        fields = {"path": path.relative_to(self._paths.root).as_posix(), "md5": lineage.hash_path(path)}
        if path == folder / "samples.json":
            self._write("table", fields | {"to": "samples.json"})
            return
        self._write("artifact", fields | {"to": "/".join(("reports", *path.relative_to(folder).parts[:-1]))})

    def _is_fresh(self, path: Path) -> bool:
        """Whether this run wrote the file; a failed stage may have left those of an earlier one."""
        return path.exists() and path.stat().st_mtime >= self._started - 1

    def _write_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        values = _numbers(metrics)
        self._last_step |= {key: max(step, self._last_step.get(key, 0)) for key in values}
        self._write("metrics", {"values": values, "step": step})

    def _write(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Write an event; after a first failure (a full disk) the run is no longer recorded."""
        if self._broken:
            return
        try:
            self._journal.write(kind, fields)
        except OSError as error:
            self._broken = True
            logger.warning("MLflow tracking: %s takes no more (%s); the stage goes on", self._journal.folder, error)

    def _start_sender(self) -> subprocess.Popen[bytes]:
        """A process of its own: MLflow's imports, its waits and its crashes stay out of the training."""
        code = Path(__file__).resolve().parents[2]
        command = [
            sys.executable,
            "-m",
            "tasks.tracking",
            str(self._paths.root.resolve()),
            str(self._journal.folder.resolve()),
        ]
        environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri(self._paths), "OMP_NUM_THREADS": "1"}
        with (self._journal.folder / "sender.log").open("wb") as log:
            return subprocess.Popen(command, cwd=code, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def _warn_early(self) -> None:
        """Say while a long training goes on, not only behind it, that MLflow is away."""
        if not self._warned and (error := load_progress(self._journal.folder).error):
            self._warn(error)

    def _warn(self, reason: str) -> None:
        self._warned = True
        logger.warning(
            "MLflow at %s has not taken everything (%s); the rest waits in %s and goes with the next stage or "
            "`python -m tasks sync`",
            tracking_uri(self._paths),
            reason,
            self._journal.folder,
        )


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow takes as metrics: finite numbers under names of the characters it allows."""
    clean: dict[str, float] = {}
    for name, value in metrics.items():
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, (int, float)) and math.isfinite(value):
            clean[metric_name(name)] = float(value)
    return clean


def metric_name(name: str) -> str:
    """A name that MLflow accepts, the same for the same metric every time."""
    return re.sub(r"/+", "/", re.sub(r"[^A-Za-z0-9_.\-/ ]", "_", name)).strip("/. ")[:250]
