"""The process beside a stage: sends its journal while it grows, and what earlier stages could not send."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
from pathlib import Path

from tasks.paths import Paths
from tasks.tracking.models import import_without_torch
from tasks.tracking.shipping import ship_journal, ship_pending
from tasks.tracking.spool import EVENTS

logger = logging.getLogger("tasks.tracking")

_POLL_SECONDS = 1.0
_RETRY_SECONDS = 10.0
_LAST_SECONDS = 5
"""What remains for sending after the stage's process was told to stop or has died."""


def main(root: Path, folder: Path) -> None:
    """Send until the stage says (by closing our input) that nothing more comes."""
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(name)s %(message)s", level=logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the stage decides when we end
    signal.signal(signal.SIGTERM, lambda _signal, _frame: signal.alarm(_LAST_SECONDS))
    paths = Paths(root)
    pause, first = 0.0, True
    while not _ends_within(pause):
        if _ship(folder, paths):
            if first:
                import_without_torch()
                _ship_others(paths)
            pause, first = _POLL_SECONDS, False
        else:
            pause = _RETRY_SECONDS
    if os.getppid() == 1:
        signal.alarm(_LAST_SECONDS)
    if (folder / EVENTS).exists():
        _ship(folder, paths)
    if (folder / EVENTS).exists():
        _ship_others(paths)  # the stage died without an end: then its journal is one of these


def _ends_within(seconds: float) -> bool:
    """Wait; True as soon as the stage has closed our input or is gone."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _ship(folder: Path, paths: Paths) -> bool:
    """Whether MLflow took everything there is; whatever fails is noted in the journal and tried again."""
    try:
        ship_journal(folder, paths)
    except Exception:
        # Any failure of any server or store; the events stay in the journal.
        logger.exception("not sent")
        return False
    return True


def _ship_others(paths: Paths) -> None:
    try:
        ship_pending(paths)
    except Exception:
        logger.exception("earlier journals not sent")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
