"""What trainers share: reporting curves, looking up at even steps, and going back to the best one."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlhf.curves import Log
from rlhf.models import load_causal, merge_adapter, put_back, trained_weights
from rlhf.params import AdapterParams, TrainingParams

DURATIONS = ("_time", "runtime", "per_second", "total_flos")
"""Parts of the trainer's metric names that differ between equal runs."""


class Bar(ProgressCallback):
    """Transformers' progress bar without the dictionaries that it writes above itself."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass


def report_curves(trainer: Any, log: Log, extra: Callable[[], Mapping[str, float]] = dict) -> None:
    """Pass the trainer's figures to a Log, with what `extra` gives at every step, and print none of them."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(Bar)
    trainer.add_callback(CurveReporter(log, extra))


class CurveReporter(TrainerCallback):
    """Passes the trainer's figures to a Log: numbers only, no durations, `held_out_` instead of `eval_`."""

    def __init__(self, log: Log, extra: Callable[[], Mapping[str, float]] = dict) -> None:
        self._log = log
        self._extra = extra

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # else a short training has no figure at all

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        figures = {
            name.replace("eval_", "held_out_"): float(value)
            for name, value in (logs or {}).items()
            if isinstance(value, (int, float)) and not any(part in name for part in DURATIONS)
        }
        if "train_loss" in figures:
            return
        extra = {} if any(name.startswith("held_out_") for name in figures) else self._extra()
        self._log({**figures, **extra}, state.global_step)


def evaluation_steps(total: int, evaluations: int) -> set[int]:
    """Evenly spaced steps, the last one among them."""
    return {max(1, round(total * part / evaluations)) for part in range(1, evaluations + 1)}


class Snapshot:
    """The trained weights of a model at some step, in CPU memory; those of an adapter are few."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def take(self, model: Any) -> None:
        self.weights = {name: value.detach().to("cpu", copy=True) for name, value in trained_weights(model).items()}

    def put_back(self, model: Any) -> None:
        """The model as it was; nothing happens where none was taken."""
        put_back(trained_weights(model), self.weights)


class EarlyStopping(TrainerCallback):
    """Evaluates at even steps, remembers the weights of the lowest held-out loss, stops when patience is spent."""

    def __init__(self, model: Any, evaluations: int, patience: int) -> None:
        self._model = model
        self._evaluations = evaluations
        self._patience = patience
        self._best = Snapshot()
        self.best_loss = math.inf
        self.best_step = 0
        self._failures = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_evaluate = state.global_step in evaluation_steps(state.max_steps, self._evaluations)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        loss = (metrics or {})["eval_loss"]
        if loss < self.best_loss:
            self.best_loss, self.best_step, self._failures = loss, state.global_step, 0
            self._best.take(self._model)
        else:
            self._failures += 1
            control.should_training_stop = self._failures >= self._patience

    def restore(self) -> None:
        """Put the best weights back; nothing happens where nothing was evaluated."""
        self._best.put_back(self._model)


def fold_adapter(
    model: Any, adapter: AdapterParams | None, sample: dict[str, torch.Tensor], reload: Callable[[], PreTrainedModel]
) -> PreTrainedModel:
    """The trained model without an adapter: merged, the logits on `sample` checked; a full model as it is.

    A base in fewer bits than fp32 would round the merged weights, so the adapter moves to the one that `reload` loads.
    """
    model.eval()
    if adapter is None:
        return model
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = PeftModel.from_pretrained(reload(), folder)
    device = next(model.parameters()).device
    return merge_adapter(model, {name: value.to(device) for name, value in sample.items()})


def finished_policy(model: Any, section: TrainingParams, start: Path, tokenizer: Any) -> PreTrainedModel:
    """The trained policy as it is saved: without an adapter. `start` is the model that training began with."""
    encoded = tokenizer("1 + 1 = 2", return_tensors="pt")
    sample = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return fold_adapter(model, section.adapter, sample, lambda: load_causal(start))
