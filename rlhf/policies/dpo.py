"""Direct preference optimisation: a thin layer over TRL's trainer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from rlhf.curves import Log
from rlhf.data.formats import Row, training_rows
from rlhf.encoding import encode_answer
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer, lora_config, set_determinism, trainer_settings
from rlhf.params import DPOParams
from rlhf.policies import PolicyFiles
from rlhf.scoring import RewardModel
from rlhf.training import CurveReporter, finished_policy


def train_dpo(params: DPOParams, files: PolicyFiles, seed: int, log: Log) -> PreTrainedModel:
    """Learn from pairs alone, the frozen SFT model as reference. Source: Rafailov et al., arXiv 2305.18290.

    Raises UserError where there are no preferences, or one is longer than `max_length`: TRL would cut it unseen.
    """
    set_determinism(seed)
    tokenizer = load_tokenizer(files.sft)
    rows = training_rows(files.preferences)
    check_pairs(rows, tokenizer, params.max_length)
    rows = settle_contradictions(rows, params, files, log)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=load_causal(files.sft, params),
            # An adapter needs no second model: switched off, it is the reference.
            ref_model=None if params.adapter else load_causal(files.sft),
            args=_configuration(params, seed, Path(folder)),
            train_dataset=Dataset.from_list(
                [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
            ),
            processing_class=tokenizer,
            peft_config=lora_config(params.adapter, "CAUSAL_LM"),
            callbacks=[CurveReporter(log)],
        )
        trainer.train()
    return finished_policy(trainer.model, params, files.sft, tokenizer)


def _configuration(params: DPOParams, seed: int, folder: Path) -> DPOConfig:
    return DPOConfig(
        **trainer_settings(params, seed, folder),
        num_train_epochs=params.epochs,
        loss_type=[params.loss, "sft"],
        loss_weights=[1.0, params.sft_weight],
        beta=params.beta,
        label_smoothing=params.label_smoothing,
        max_length=params.max_length,
        precompute_ref_log_probs=params.adapter is None,
    )


def settle_contradictions(rows: list[Row], params: DPOParams, files: PolicyFiles, log: Log) -> list[Row]:
    """The pairs to learn from: those whose label the reward model contradicts are kept, dropped or turned round.

    A reward model that did not learn its wrong labels by heart names most of them (docs/methods/dpo.md has figures).
    Raises UserError where nothing is left, or there is no reward model.
    """
    if params.contradicted == "keep":
        return rows
    model = RewardModel(files.reward, params.batch_size)
    prompts = [row["prompt"] for row in rows]
    better, worse = (model.score(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    against = [lower > higher for higher, lower in zip(better, worse, strict=True)]
    log({"pairs/contradicted": sum(against) / len(rows)}, 0)
    if params.contradicted == "relabel":
        return [_reversed(row) if turn else row for row, turn in zip(rows, against, strict=True)]
    kept = [row for row, drop in zip(rows, against, strict=True) if not drop]
    if not kept:
        raise UserError("the reward model contradicts every preference; set policies' contradicted to keep")
    return kept


def _reversed(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def check_pairs(rows: list[Row], tokenizer: Any, max_length: int) -> None:
    """Refuse an empty file and pairs that do not fit in `max_length` tokens."""
    if not rows:
        raise UserError("dpo has no preference pairs to learn from; give prepare.data.preferences a source")
    for row in rows:
        for side in ("chosen", "rejected"):
            length = len(encode_answer(tokenizer, row["prompt"], row[side]))
            if length > max_length:
                raise UserError(
                    f"preference {row['id']} is {length} tokens long with its {side} answer, "
                    f"max_length is {max_length}; "
                    "raise max_length or lower validate.max_prompt_tokens and validate.max_completion_tokens"
                )
