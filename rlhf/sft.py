"""Supervised fine-tuning: a base model learns to answer as the demonstrations do."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlhf.curves import CurveRecorder, Log, write_json
from rlhf.data.formats import completion_text, render_prompt, training_rows
from rlhf.encoding import IGNORED, Reading, describe_template, encode_prompt, pad_batch, read_answer
from rlhf.errors import UserError
from rlhf.evaluation.generation import Decoding, generate
from rlhf.ledger import Ledger, Limit
from rlhf.models import (
    load_causal,
    load_tokenizer,
    lora_config,
    on_device,
    save_model,
    set_determinism,
    target_modules_named,
    trainer_settings,
)
from rlhf.params import SFTParams
from rlhf.training import EarlyStopping, fold_adapter, report_curves

SAMPLES_SHOWN, MASKS_SHOWN = 8, 3
ANSWERS_DRAWN = 32
"""Greedy answers to held-out prompts that tell whether the model has learnt to stop."""


@dataclass(frozen=True)
class SFTFiles:
    """What fine-tuning reads (base model, rows) and writes (model, report folder)."""

    base: Path
    train: Path
    test: Path
    model: Path
    report: Path


def train_sft(section: SFTParams, files: SFTFiles, seed: int, log: Log, ledger: Ledger) -> dict[str, Any]:
    """Fine-tune the base model, keep the weights of the lowest held-out loss, save them with adapters merged.

    Returns the metrics: losses in nats per token, `held_out_token_accuracy`, `steps`, `best_step`, `stop_rate`, what
    became of the rows, and by what text becomes tokens. Without held-out rows nothing stops early.
    Raises UserError on unusable rows, and, once model and report are written, where too few answers end by themselves.
    """
    set_determinism(seed)
    tokenizer: Any = load_tokenizer(files.base)
    limit = Limit(section.max_length, f"sft.max_length is {section.max_length}", is_cuttable=True)
    train, test = (_read_demonstrations(path, tokenizer, limit, ledger) for path in (files.train, files.test))
    _check_training_set(train, tokenizer, files.train, section.max_length)
    recorder = CurveRecorder(log)
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(section, seed, Path(folder))
        model = load_causal(files.base, section)
        trainer = _build_trainer(section, settings, (train, test), (model, tokenizer))
        report_curves(trainer, recorder)
        stopping = EarlyStopping(trainer.model, section.evaluations, section.patience)
        before = trainer.evaluate() if test else {}
        if test:
            trainer.add_callback(stopping)
        steps = trainer.train().global_step
        stopping.restore()
        after = trainer.evaluate() if test else {}
    recorder.write(files.report / "curves.csv")
    sample = pad_batch([row.sequences[0] for row in (test or train)[:8]], tokenizer.pad_token_id)
    model = fold_adapter(trainer.model, section.adapter, sample, lambda: load_causal(files.base))
    save_model(model, tokenizer, files.model)
    write_json(files.report / "trained_on.json", [_show_mask(tokenizer, row) for row in train[:MASKS_SHOWN]])
    return {
        "loss": _last(recorder, "loss"),
        "held_out_loss": after.get("eval_loss"),
        "held_out_loss_before": before.get("eval_loss"),
        "held_out_token_accuracy": after.get("eval_mean_token_accuracy"),
        "steps": steps,
        "best_step": stopping.best_step if test else steps,
        "ledger": ledger.write(files.report),
        "template": describe_template(tokenizer),
        "stop_rate": _answer_held_out(section, files, model, tokenizer),
    }


def _build_trainer(
    section: SFTParams, settings: dict[str, Any], data: tuple[list[Reading], list[Reading]], parts: tuple[Any, Any]
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
        eval_dataset=_dataset(test) if test else None,
        processing_class=tokenizer,
        peft_config=lora_config(section.adapter, "CAUSAL_LM"),
    )


def _dataset(rows: list[Reading]) -> Dataset:
    """Token ids and labels, which are IGNORED on the prompt."""
    labels = [[IGNORED] * row.starts[0] + row.answers[0] for row in rows]
    return Dataset.from_dict({"input_ids": [row.sequences[0] for row in rows], "labels": labels})


def _read_demonstrations(path: Path, tokenizer: Any, limit: Limit, ledger: Ledger) -> list[Reading]:
    readings = (read_answer(tokenizer, row, "completion") for row in training_rows(path))
    return ledger.admit(f"sft/{path.stem}", readings, limit, tokenizer)


def _check_training_set(rows: list[Reading], tokenizer: Any, path: Path, max_length: int) -> None:
    if not rows:
        raise UserError(f"{path} has no demonstration that fits into sft.max_length = {max_length} tokens; raise it")
    if not any(tokenizer.eos_token_id in row.answers[0] for row in rows):
        raise UserError(
            f"every completion of {path} is cut before its end token at sft.max_length = {max_length} tokens, "
            "so the model would never learn to stop; raise it"
        )


def _last(recorder: CurveRecorder, name: str) -> float | None:
    values = [row[name] for _, row in sorted(recorder.rows.items()) if name in row]
    return values[-1] if values else None


def _show_mask(tokenizer: Any, row: Reading) -> dict[str, str]:
    """A training row as the model reads it, special tokens written out: what is given, and what is learnt."""
    ids, start = row.sequences[0], row.starts[0]
    return {"row": row.row, "given": tokenizer.decode(ids[:start]), "learnt": tokenizer.decode(ids[start:])}


def _answer_held_out(section: SFTParams, files: SFTFiles, model: Any, tokenizer: Any) -> float | None:
    """Write the first greedy answers to held-out prompts; the share of answers that end by themselves.

    Raises UserError where that share is below `section.min_stop_rate`.
    """
    rows = training_rows(files.test)[:ANSWERS_DRAWN]
    if not rows:
        return None
    longest = max(len(encode_prompt(tokenizer, row["prompt"])) for row in rows)
    decoding = Decoding(max(1, section.max_length - longest), 0.0, ANSWERS_DRAWN, 0)
    answers = generate(on_device(model).eval(), tokenizer, [row["prompt"] for row in rows], decoding)
    samples = [
        {
            "prompt": render_prompt(tokenizer, row["prompt"]),
            "answer": answer.text,
            "demonstration": completion_text(row["completion"]),
        }
        for row, answer in zip(rows[:SAMPLES_SHOWN], answers, strict=False)
    ]
    write_json(files.report / "samples.json", samples)
    share = sum(answer.ended for answer in answers) / len(answers)
    if share < section.min_stop_rate:
        raise UserError(
            f"after fine-tuning only {share:.0%} of {len(answers)} answers end by themselves, less than "
            f"sft.min_stop_rate {section.min_stop_rate:g} (see {files.report / 'samples.json'}); train longer, raise "
            "sft.max_length, look at reports/sft/trained_on.json for end tokens, or lower that rate"
        )
    return share
