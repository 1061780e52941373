"""Trainings by transformers' trainers that were stopped go on: seen rows are counted through, then all is put back."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.checkpoints import Checkpoints, Part, Parts
from rlhf.models import put_back, trained_weights

logger = logging.getLogger(__name__)

MEMORY = (
    "_tr_loss",  # transformers: losses since the last figures, ...
    "_total_loss_scalar",  # ... those before, ...
    "_globalstep_last_logged",  # ... and where the two meet
    "_metrics",  # TRL: what is averaged into the next figures
    "_stored_metrics",  # the same in ORPO and CPO
    "_total_train_tokens",
    "_step",  # GRPO and RLOO: forward passes, ...
    "_buffered_inputs",  # ... and the answers that further passes will read again
)
"""What trainers keep in mind from one step to the next and forget in their own checkpoints; none has all of it."""


def make_resumable(trainer: Any, checkpoints: Checkpoints | None, **parts: Part) -> None:
    """Let a trainer go on from the newest checkpoint, and offer one after every step; `parts` change beside it.

    Not their own checkpoints: those keep neither half a window of figures nor buffered answers, restart the order of
    GRPO's prompts, are no unit on the disk, and know nothing of our parts. A training of several processes, each with
    a share of the state, has no checkpoints.
    """
    if checkpoints is None:
        return
    if trainer.accelerator.num_processes > 1:
        logger.warning("trained by several processes, which have no checkpoints: a stop costs the whole training")
        return
    trainer.add_callback(Resuming(trainer, checkpoints, Parts(trainer=TrainerPart(trainer), **parts)))


class TrainerPart:
    """What a trainer changes: trained weights, moments, learning rates, and what it keeps in mind."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "tokens": trainer.state.num_input_tokens_seen,
            "weights": {name: value.detach() for name, value in trained_weights(trainer.model).items()},
            "moments": trainer.optimizer.state_dict(),
            "schedule": trainer.lr_scheduler.state_dict(),
            "memory": {name: _plain(getattr(trainer, name)) for name in MEMORY if hasattr(trainer, name)},
        }

    def restore(self, state: dict[str, Any]) -> None:
        trainer = self._trainer
        trainer.state.num_input_tokens_seen = state["tokens"]
        put_back(trained_weights(trainer.model), state["weights"])
        trainer.optimizer.load_state_dict(state["moments"])
        trainer.lr_scheduler.load_state_dict(state["schedule"])
        memory: Any = send_to_device(state["memory"], trainer.args.device)
        for name, value in memory.items():
            if isinstance(value, dict):
                for mode, figures in value.items():
                    getattr(trainer, name)[mode].update(figures)
            else:
                setattr(trainer, name, value)


def _plain(value: Any) -> Any:
    """Dictionaries with default values, within lists too, as ordinary ones: those can be read without running code."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


class Resuming(TrainerCallback):
    """Offers a checkpoint at the beginning of every step but the first; goes on from one by the trainer's own loop.

    Up to the checkpoint's step that loop runs without computing, so that the order of rows is its own, whatever
    sampler it has; no other callback hears of it. There all parts are put back, at the very point they were saved at.
    """

    def __init__(self, trainer: Any, checkpoints: Checkpoints, parts: Parts) -> None:
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._parts = parts
        self._saved = checkpoints.resume()
        self._callbacks: list[TrainerCallback] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._saved:
            handler = self._trainer.callback_handler
            self._callbacks, handler.callbacks = handler.callbacks, [self]
            self._trainer.training_step = lambda *_, **__: torch.zeros((), device=args.device)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The step before has been logged by now; on its end the gradient's norm would still be a local variable.
        step = state.global_step
        if not self._saved:
            if step:
                self._checkpoints.offer(step, lambda: {"step": step, **self._parts.state()})
        elif step == self._saved["step"]:
            del self._trainer.training_step
            self._trainer.callback_handler.callbacks = self._callbacks
            self._parts.restore(self._saved)
            self._saved = None
