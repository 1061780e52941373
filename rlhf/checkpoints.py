"""Checkpoints of a training that was stopped: written whole or not at all, and read only by the same training."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from rlhf.params import Section

logger = logging.getLogger(__name__)

KEPT = 2
"""So many checkpoints stay, lest the newest turn out to be unreadable."""

CODE = Path(__file__).parent
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")
"""What computes, besides our own code: another version may leave other bytes, or keep other things in mind."""


def training_key(section: Section, seed: int, inputs: Sequence[Path], other: str = "") -> str:
    """What a training is: the hash of its params, its seed, our code, versions and the bytes of all its inputs.

    `inputs` are files or folders; their names inside a folder count, the places where they lie do not. `other` is the
    key of what accompanies it.
    """
    versions = " ".join(version(library) for library in LIBRARIES)
    digest = hashlib.sha256(f"{section.model_dump_json()} {seed} {versions} {other}".encode())
    for place, pattern in [(CODE, "*.py"), *((place, "*") for place in inputs)]:
        files = sorted(path for path in place.rglob(pattern) if path.is_file()) if place.is_dir() else [place]
        for path in files:
            digest.update(f"\n{path.relative_to(place)} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one training in a folder of their own.

    They are written at least `seconds` apart, and further where writing would take more than `share` of the time.
    """

    def __init__(self, folder: Path, seconds: float, share: float) -> None:
        self._root = folder
        self._seconds = seconds
        self._share = share
        self._folder = folder
        self._due = 0.0

    def open(self, key: str) -> None:
        """Be the checkpoints of the training `key`; what other trainings left here is removed."""
        self._folder = self._root / key[:16]
        self._due = time.monotonic() + self._seconds
        if self._root.is_dir():
            for other in self._root.iterdir():
                if other != self._folder:
                    logger.info("checkpoints in %s are of other params, seed, code or data: starting afresh", other)
                    shutil.rmtree(other)

    def resume(self) -> dict[str, Any] | None:
        """The newest readable state, on the CPU."""
        import torch

        for path in reversed(self._written()):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError) as error:
                logger.warning("checkpoint %s is unreadable (%s) and is passed over", path, type(error).__name__)
                continue
            logger.info("going on from %s", path)
            return state
        return None

    def offer(self, step: int, make_state: Callable[[], dict[str, Any]]) -> None:
        """Write the state after `step` where a checkpoint is due; older ones but the last go."""
        started = time.monotonic()
        if started < self._due:
            return
        self._write(self._folder / f"{step:09}.pt", make_state())
        for path in self._written()[:-KEPT]:
            path.unlink()
        finished = time.monotonic()
        self._due = finished + max(self._seconds, (finished - started) / self._share)

    def clear(self) -> None:
        """Remove them all: the training has ended well and its results are saved."""
        shutil.rmtree(self._root, ignore_errors=True)

    def _written(self) -> list[Path]:
        return sorted(self._folder.glob("*.pt"))

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        import torch

        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power cut could forget the new name
        finally:
            os.close(folder)


# what changes -------------------------------------------------------------------------------------


class Part(Protocol):
    """Something that changes in a training: what `state` gives, in plain types and tensors, `restore` puts back."""

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class Parts:
    """All that changes in a training, each part under its name; random numbers come last, lest a part draw some."""

    def __init__(self, **parts: Part) -> None:
        self._parts = parts

    def state(self) -> dict[str, Any]:
        return {"parts": {name: part.state() for name, part in self._parts.items()}, "random": random_state()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.restore(state["parts"][name])
        set_random_state(state["random"])


# random state -------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The state of every generator that `set_determinism` seeds, in plain types and tensors."""
    import numpy
    import torch

    state: Any = numpy.random.get_state(legacy=True)
    kind, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every generator back where `random_state` found it."""
    import numpy
    import torch

    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
