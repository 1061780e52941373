"""Mathematical equality of two texts, decided in a process of its own that ends where it thinks for too long."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.params import Place
from rlhf.rewards.answers import expected_answers, is_right
from rlhf.rewards.places import find_answer

WORKER = Path(__file__).with_name("equality_worker.py")
LONGEST = 1000
"""Characters of an answer; nothing that long is a result."""
WORDS = re.compile(r"[^\W\d_]{2,}(?:\s+[^\W\d_]+)*")


class MathEquality:
    """1 where an answer is mathematically equal to the column `answer`, 0 elsewhere, also where that takes too long.

    Fractions, LaTeX, sets, intervals and terms are understood (math-verify). A power such as 9^9^9^9 is computed in
    one call that no signal handler interrupts, and a signal reaches the main thread alone; so the comparison has a
    process that the system ends after `seconds`, and the next one starts another. Whether a slow comparison ends in
    time is the one thing here that depends on the machine.
    """

    def __init__(self, answer_in: Place, seconds: float) -> None:
        self._answer_in: Place = answer_in
        self._seconds = seconds
        self._worker: subprocess.Popen[str] | None = None
        self._stop: weakref.finalize[Any, Any] | None = None
        self._lock = threading.Lock()

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[Any] | None = None, **_: Any
    ) -> list[float]:
        expected = expected_answers(prompts, completions, answer)
        pairs = zip(completions, expected, strict=True)
        return [
            float(self.are_equal(find_answer(completion, self._answer_in), str(right))) for completion, right in pairs
        ]

    def are_equal(self, given: str | None, right: str) -> bool:
        """Whether both mean the same; words are compared as words, since Paris and pairs are the same product."""
        if given is None or len(given) > LONGEST:
            return False
        if is_right(given, right):
            return True
        if WORDS.fullmatch(given.strip()) or WORDS.fullmatch(right.strip()):
            return False
        with self._lock:
            return self._ask(given, right)

    def _ask(self, given: str, right: str) -> bool:
        worker = self._running()
        try:
            print(json.dumps([given, right]), file=worker.stdin, flush=True)
            verdict = worker.stdout.readline() if worker.stdout else ""
        except BrokenPipeError:
            verdict = ""
        if not verdict:
            self._end()
        return verdict == "1\n"

    def _running(self) -> subprocess.Popen[str]:
        if self._worker is None:
            # -P: else the folder of this module would stand before the standard library.
            command = [sys.executable, "-P", str(WORKER), str(self._seconds)]
            self._worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._stop = weakref.finalize(self, _end_process, self._worker)
            if self._worker.stdout is None or not self._worker.stdout.readline():
                self._end()
                raise UserError("math-verify, which the reward 'math' needs, does not start; install it")
        return self._worker

    def _end(self) -> None:
        if self._stop:
            self._stop()
        self._worker = self._stop = None


def _end_process(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
