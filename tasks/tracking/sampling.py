"""The machine's load during a stage, sampled from a thread and named as MLflow's own system metrics are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping

SECONDS = 5.0
_MB = 1_000_000


class SystemSampler:
    """Calls `write(metrics, step)` every few seconds until it is stopped, and `watch()` each time."""

    def __init__(self, write: Callable[[Mapping[str, float], int], None], watch: Callable[[], None]) -> None:
        self._write, self._watch = write, watch
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end; returns within a second."""
        self._stopped.set()
        self._thread.join(timeout=1)

    def _sample(self) -> None:
        import psutil

        process = psutil.Process()
        # The first calls set the marks that later ones measure from.
        psutil.cpu_percent()
        process.cpu_percent()
        step = 0
        while True:
            stopped = self._stopped.wait(SECONDS)
            memory = psutil.virtual_memory()
            sample = {
                "system/cpu_utilization_percentage": psutil.cpu_percent(),
                "system/system_memory_usage_megabytes": memory.used / _MB,
                "system/system_memory_usage_percentage": memory.percent,
                "system/process_cpu_percentage": process.cpu_percent(),
                "system/process_memory_megabytes": process.memory_info().rss / _MB,
            }
            self._write(sample | _gpu_memory(), step)
            if stopped:
                return
            self._watch()
            step += 1


def _gpu_memory() -> dict[str, float]:
    """What this process has reserved, where it uses a GPU at all; nothing is imported or started for it."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return {}
    return {"system/gpu_memory_usage_megabytes": torch.cuda.memory_reserved() / _MB}
