"""Supervised fine-tuning: a base model learns to answer as the demonstrations do."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlhf.curves import CurveRecorder, Log, write_json
from rlhf.data.formats import completion_text, is_conversational, render_prompt, training_rows
from rlhf.encoding import IGNORED, Demonstration, encode_demonstration, pad_batch
from rlhf.errors import UserError
from rlhf.models import (
    load_causal,
    load_tokenizer,
    lora_config,
    save_model,
    set_determinism,
    target_modules_named,
    trainer_settings,
)
from rlhf.params import SFTParams
from rlhf.training import CurveReporter, EarlyStopping, fold_adapter

logger = logging.getLogger(__name__)

SAMPLES_SHOWN = 8
SAMPLE_TOKENS = 128


@dataclass(frozen=True)
class SFTFiles:
    """What fine-tuning reads (base model, rows) and writes (model, report folder)."""

    base: Path
    train: Path
    test: Path
    model: Path
    report: Path


@dataclass(frozen=True)
class Demonstrations:
    """The usable rows of a file, and how many were cut at `max_length` or left out as the prompt alone fills it."""

    rows: list[Demonstration]
    truncated: int
    dropped: int


def train_sft(section: SFTParams, files: SFTFiles, seed: int, log: Log) -> dict[str, float | int | None]:
    """Fine-tune the base model, keep the weights of the lowest held-out loss, save them with adapters merged.

    Returns the metrics: losses in nats per token, `held_out_token_accuracy`, `steps`, `best_step`, and how many rows
    were used, cut or dropped. Without held-out rows nothing stops early. Raises UserError on unusable rows.
    """
    set_determinism(seed)
    tokenizer: Any = load_tokenizer(files.base)
    train = _read_demonstrations(files.train, tokenizer, section.max_length)
    test = _read_demonstrations(files.test, tokenizer, section.max_length)
    _check_training_set(train, tokenizer, files.train, section.max_length)
    recorder = CurveRecorder(log)
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(section, seed, Path(folder))
        model = load_causal(files.base, section)
        trainer = _build_trainer(section, settings, (train, test), (model, tokenizer))
        trainer.add_callback(CurveReporter(recorder))
        stopping = EarlyStopping(trainer.model, section.evaluations, section.patience)
        before = trainer.evaluate() if test.rows else {}
        if test.rows:
            trainer.add_callback(stopping)
        steps = trainer.train().global_step
        stopping.restore()
        after = trainer.evaluate() if test.rows else {}
    recorder.write(files.report / "curves.csv")
    sample = pad_batch([row.input_ids for row in (test.rows or train.rows)[:8]], tokenizer.pad_token_id)
    model = fold_adapter(trainer.model, section.adapter, sample, lambda: load_causal(files.base))
    save_model(model, tokenizer, files.model)
    write_json(files.report / "samples.json", _write_answers(model, tokenizer, files.test, section.max_length))
    return {
        "loss": _last(recorder, "loss"),
        "held_out_loss": after.get("eval_loss"),
        "held_out_loss_before": before.get("eval_loss"),
        "held_out_token_accuracy": after.get("eval_mean_token_accuracy"),
        "steps": steps,
        "best_step": stopping.best_step if test.rows else steps,
        **_count(train, "rows"),
        **_count(test, "held_out_rows"),
    }


def _build_trainer(
    section: SFTParams, settings: dict[str, Any], data: tuple[Demonstrations, Demonstrations], parts: tuple[Any, Any]
) -> SFTTrainer:
    """TRL's trainer; `data` is training and held-out rows, `parts` model and tokenizer."""
    train, test = data
    model, tokenizer = parts
    return target_modules_named(section.adapter)(SFTTrainer)(
        model=model,
        args=SFTConfig(
            **settings,
            num_train_epochs=section.epochs,
            max_length=None,  # the rows are cut, and counted, already
            completion_only_loss=True,
            train_sampling_strategy="group_by_length",  # else one long row makes its whole batch long
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=_dataset(train),
        eval_dataset=_dataset(test) if test.rows else None,
        processing_class=tokenizer,
        peft_config=lora_config(section.adapter, "CAUSAL_LM"),
    )


def _dataset(demonstrations: Demonstrations) -> Dataset:
    rows = demonstrations.rows
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})


def _read_demonstrations(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Demonstrations:
    encoded = [encode_demonstration(tokenizer, row, max_length) for row in training_rows(path)]
    usable = [row for row in encoded if any(label != IGNORED for label in row.labels)]
    truncated, dropped = sum(row.truncated for row in usable), len(encoded) - len(usable)
    if truncated or dropped:
        logger.warning(
            "%s: %d of %d rows are cut at sft.max_length = %d tokens, %d are left out as their prompt alone fills it",
            path.name, truncated, len(encoded), max_length, dropped,
        )  # fmt: skip
    return Demonstrations(usable, truncated, dropped)


def _count(demonstrations: Demonstrations, name: str) -> dict[str, int]:
    return {
        name: len(demonstrations.rows),
        f"{name}_truncated": demonstrations.truncated,
        f"{name}_dropped": demonstrations.dropped,
    }


def _check_training_set(demonstrations: Demonstrations, tokenizer: Any, path: Path, max_length: int) -> None:
    if not demonstrations.rows:
        raise UserError(f"{path} has no demonstration that fits into sft.max_length = {max_length} tokens; raise it")
    if not any(tokenizer.eos_token_id in row.labels for row in demonstrations.rows):
        raise UserError(
            f"every completion of {path} is cut before its end token at sft.max_length = {max_length} tokens, "
            "so the model would never learn to stop; raise it"
        )


def _last(recorder: CurveRecorder, name: str) -> float | None:
    values = [row[name] for _, row in sorted(recorder.rows.items()) if name in row]
    return values[-1] if values else None


def _write_answers(model: Any, tokenizer: Any, path: Path, max_length: int) -> list[dict[str, str]]:
    """The fine-tuned model's greedy answers to the first held-out prompts, beside the demonstrations."""
    shown = []
    for row in training_rows(path)[:SAMPLES_SHOWN]:
        prompt = render_prompt(tokenizer, row["prompt"])
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not is_conversational(row["prompt"]))
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        room = max(1, max_length - inputs["input_ids"].shape[1])
        output = model.generate(**inputs, do_sample=False, max_new_tokens=min(room, SAMPLE_TOKENS))
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        shown.append({"prompt": prompt, "answer": answer, "demonstration": completion_text(row["completion"])})
    return shown
