"""How a training lets itself be looked at; rlhf.watch looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.checkpoints import Part

if TYPE_CHECKING:
    from rlhf.policies import Run


class Watch(Part, Protocol):
    """Who looks at a policy as it trains, and knows which of its states was the best."""

    @property
    def key(self) -> str:
        """How it looks: the same for the same settings."""
        ...

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that it reads."""
        ...

    def look(self, model: Any, step: int, total: int | None) -> bool:
        """Measure the model where a look is due after `step` of `total` steps (None: it is); true where training shall
        end.
        """
        ...

    def roll_back(self, model: Any, step: int) -> None:
        """Make of the model, trained for `step` steps, the best one that was seen."""
        ...


class Watching(TrainerCallback):
    """Has the watch of a run look at the model that a trainer of transformers trains."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._run.look(model, state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if self._run.look(model, state.global_step, state.max_steps):
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._run.roll_back(model, state.global_step)
