"""What both sides of benchmarks/ppo.py measure by one code; needs nothing but the standard library."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Measures:
    """The times of all rollouts with their updates, the figures, and the process's peak of memory."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self.rows: list[dict[str, float]] = []
        self._started = self._processor_started = 0.0

    def start(self) -> None:
        """A rollout begins; what was done since the last one ended counts for nothing."""
        self._started, self._processor_started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Its updates are done."""
        self.seconds.append(time.perf_counter() - self._started)
        self.processor_seconds.append(time.process_time() - self._processor_started)

    def write(self, folder: Path) -> None:
        """Write result.json."""
        result: dict[str, Any] = {
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "peak_mib": peak_mib(),
            "curves": self.rows,
        }
        (folder / "result.json").write_text(json.dumps(result))


def peak_mib() -> float:
    """The process's own peak of resident memory; `getrusage` would count the parent's too, from before the exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
