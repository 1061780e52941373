"""The processes that share one training: what they exchange, and which of them speaks for all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Team:
    """`size` processes, of which this one has the number `rank`; the first one is the main process.

    All hold the same weights and draw the same random numbers. For one process alone every method does nothing.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process keeps the books: curves, checkpoints, what is saved."""
        return self.rank == 0

    def share(self, count: int, unit: int = 1) -> range:
        """The rows of this process out of `count`: contiguous, in whole units, nearly as many as the others have."""
        units = count // unit
        return range(self.rank * units // self.size * unit, (self.rank + 1) * units // self.size * unit)

    def gather(self, value: Value) -> list[Value]:
        """The value of every process, in the order of their numbers; tensors have to lie on the CPU."""
        if self.size == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def from_main(self, action: Callable[[], Value]) -> Value:
        """What an action of the main process gives, while the others wait for it."""
        if self.size == 1:
            return action()
        import torch.distributed

        values: list[Any] = [action() if self.is_main else None]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Make of each tensor, in place, its sum over all processes."""
        if self.size == 1:
            return
        import torch
        import torch.distributed

        whole = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(whole)
        for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def join_team() -> Team:
    """The processes that `torchrun` or `accelerate launch` started together with this one.

    Raises UserError where the launcher would split the weights: no process could then save or watch a whole model.
    """
    size = process_count()
    if size == 1:
        return Team()
    splits = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
    for name, variable in splits.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"the launcher asks for {name}, but each process has to hold the whole model, which is watched and "
                "saved from the first one; launch plain processes, and use an adapter where memory is short"
            )
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return Team(state.process_index, state.num_processes)


@contextmanager
def shared_folder(team: Team) -> Iterator[Path]:
    """A folder of the main process that is gone when the last process has left it."""
    with tempfile.TemporaryDirectory() as own:
        yield Path(team.from_main(lambda: own))
        team.gather(None)


def process_count() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_share(name: str, count: int) -> None:
    """Raise UserError where `count` rows, which params call `name`, cannot be split evenly among the processes."""
    if count % process_count():
        raise UserError(
            f"{name} is {count}, which {process_count()} processes cannot share evenly; choose a multiple, or launch "
            "another number of processes"
        )
