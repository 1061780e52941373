"""The process that compares: pairs of texts come in as JSON lines, 1 or 0 goes out; too long a thought is its end."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import signal
import sys
from typing import Any

MEMORY = 4 * 2**30
"""Bytes of address space: a number that does not fit is not equal."""


def are_equal(given: str, right: str) -> bool:
    """Whether math-verify takes both for the same; it must find something in either."""
    from math_verify import parse, verify

    # Whatever is asked of it, the wrong things it may raise are many, and each means that it does not know.
    try:
        # None is how it is told to need no handler; its signatures promise numbers.
        options: dict[str, Any] = {"parsing_timeout": None}
        wanted, found = (parse(f"${text.replace('$', ' ').strip()}$", **options) for text in (right, given))
        return bool(wanted and found) and verify(wanted, found, timeout_seconds=None)
    except Exception:  # noqa: BLE001
        return False


def main(seconds: float) -> None:
    """Answer until no more is asked. The alarm has no handler: the system ends the process, in C code too."""
    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no verdict
    with contextlib.suppress(ValueError, OSError):  # not every system has such a limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    are_equal("1/2", "0.5")  # what is imported late, and warned of once, is behind us
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        given, right = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = are_equal(given, right)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
