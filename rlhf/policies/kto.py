"""Kahneman-Tversky optimisation: a thin layer over TRL's trainer."""

from __future__ import annotations

import random

from transformers import PreTrainedModel
from trl import KTOConfig, KTOTrainer

from rlhf.data.formats import Row
from rlhf.params import KTOParams
from rlhf.policies import PolicyFiles, Run, Settings
from rlhf.policies.pairs import PairMethod, train_on_pairs


def train_kto(params: KTOParams, files: PolicyFiles, run: Run) -> PreTrainedModel:
    """Learn from single answers that are good or bad. Source: Ethayarajh et al., arXiv 2402.01306."""
    method = PairMethod(KTOTrainer, configuration, labelled_answers, has_reference=True)
    return train_on_pairs(params, files, run, method)


def configuration(params: KTOParams, settings: Settings) -> KTOConfig:
    """TRL's arguments; no limit of tokens, for pairs are checked, and prompts with another's answer may be longer."""
    return KTOConfig(
        **settings,
        loss_type=params.loss,
        beta=params.beta,
        desirable_weight=params.desirable_weight,
        undesirable_weight=params.undesirable_weight,
        max_length=None,
        precompute_ref_log_probs=params.adapter is None,
    )


def labelled_answers(pairs: list[Row], seed: int) -> list[Row]:
    """Two rows of each pair, a desirable and an undesirable answer, in random order.

    TRL reads rows in the order given, and takes its KL from each prompt with the answer of the row before: the two
    answers to one prompt must not stand together.
    """
    sides = (("chosen", True), ("rejected", False))
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": label} for pair in pairs for side, label in sides
    ]
    random.Random(seed).shuffle(rows)
    return rows
