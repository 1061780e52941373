"""Work of several models that share nothing, done at the same time on one machine's cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")


def side_by_side(jobs: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of jobs that touch none of each other's tensors, in order.

    They share torch's threads: small models do not fill two cores with one operation, but with one model each. In turn
    where torch has one thread, or an accelerator does the work. No job may draw random numbers, as their order would be
    left to chance.
    """
    workers = min(len(jobs), torch.get_num_threads())
    if workers < 2 or torch.cuda.is_available():
        return [job() for job in jobs]
    threads = torch.get_num_threads()
    is_training = torch.is_grad_enabled()

    def run(job: Callable[[], Result]) -> Result:
        torch.set_num_threads(threads // workers)
        # Each thread of Python has a switch of its own.
        with torch.set_grad_enabled(is_training):
            return job()

    try:
        return list(_pool(workers).map(run, jobs))
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="models")
