"""Learning from preference pairs, by whichever of TRL's trainers: which pairs, how long, and the common frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from rlhf.curves import Log
from rlhf.data.formats import Row, training_rows
from rlhf.encoding import read_answer
from rlhf.errors import UserError
from rlhf.ledger import Ledger, Limit
from rlhf.models import (
    load_causal,
    load_tokenizer,
    set_determinism,
)
from rlhf.params import PairParams
from rlhf.policies import PolicyFiles, Run, Settings
from rlhf.policies.over_trl import train_over_trl
from rlhf.scoring import RewardModel

ENDS = 2
"""The begin and the end token that the trainers of ORPO and CPO may add to a checked pair."""


@dataclass(frozen=True)
class PairMethod:
    """One of TRL's trainers, its configuration from params and common settings, and the rows it reads from pairs."""

    trainer: Callable[..., Any]
    configuration: Callable[[Any, Settings], Any]
    rows: Callable[[list[Row], int], list[Row]]
    has_reference: bool


def train_on_pairs(params: PairParams, files: PolicyFiles, run: Run, method: PairMethod) -> PreTrainedModel:
    """The SFT model after `method` has learnt from the preferences.

    Pairs longer than `max_length`, which TRL would cut unseen, go by the run's ledger.
    Raises UserError where there are no preferences.
    """
    set_determinism(run.seed)
    tokenizer = load_tokenizer(files.sft)
    pairs = read_pairs(files.preferences, tokenizer, params, run.ledger)
    pairs = settle_contradictions(pairs, params, files, run.log)

    def arguments(settings: Settings) -> dict[str, Any]:
        return {
            "model": load_causal(files.sft, params),
            "args": method.configuration(params, settings | {"num_train_epochs": params.epochs}),
            "train_dataset": Dataset.from_list(method.rows(pairs, run.seed)),
            "processing_class": tokenizer,
            **(_reference(params, files.sft) if method.has_reference else {}),
        }

    return train_over_trl(params, files, run, method.trainer, arguments)


def _reference(params: PairParams, sft: Path) -> dict[str, Any]:
    # An adapter needs no second model: switched off, it is the reference.
    return {"ref_model": None if params.adapter else load_causal(sft)}


def pair_rows(pairs: list[Row], seed: int) -> list[Row]:
    """The pairs as they are; the trainer shuffles them."""
    return [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs]


def read_pairs(path: Path, tokenizer: Any, params: PairParams, ledger: Ledger) -> list[Row]:
    """The pairs of a file that fit in `max_length` tokens. Raises UserError where there is none, as `Ledger.admit`."""
    pairs = training_rows(path)
    if not pairs:
        raise UserError(
            f"{params.algorithm} has no preference pairs to learn from; give prepare.data.preferences a source"
        )
    readings = (read_answer(tokenizer, pair, "chosen", "rejected") for pair in pairs)
    limit = Limit(params.max_length, f"max_length is {params.max_length}")
    return ledger.admit_rows("preferences", pairs, readings, limit, tokenizer)


def settle_contradictions(pairs: list[Row], params: PairParams, files: PolicyFiles, log: Log) -> list[Row]:
    """The pairs to learn from: those whose label the reward model contradicts are kept, dropped or turned round.

    A reward model that did not learn its wrong labels by heart names most of them (docs/methods/dpo.md has figures).
    Raises UserError where nothing is left, or there is no reward model.
    """
    if params.contradicted == "keep":
        return pairs
    model = RewardModel(files.reward, params.batch_size)
    prompts = [pair["prompt"] for pair in pairs]
    better, worse = (model.score(prompts, [pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    against = [lower > higher for higher, lower in zip(better, worse, strict=True)]
    log({"pairs/contradicted": sum(against) / len(pairs)}, 0)
    if params.contradicted == "relabel":
        return [_reversed(pair) if turn else pair for pair, turn in zip(pairs, against, strict=True)]
    kept = [pair for pair, drop in zip(pairs, against, strict=True) if not drop]
    if not kept:
        raise UserError("the reward model contradicts every preference; set policies' contradicted to keep")
    return kept


def _reversed(pair: Row) -> Row:
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
