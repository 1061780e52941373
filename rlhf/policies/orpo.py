"""Odds ratio preference optimisation: a thin layer over TRL's trainer."""

from __future__ import annotations

from transformers import PreTrainedModel
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from rlhf.params import ORPOParams
from rlhf.policies import PolicyFiles, Run, Settings
from rlhf.policies.pairs import ENDS, PairMethod, pair_rows, train_on_pairs


def train_orpo(params: ORPOParams, files: PolicyFiles, run: Run) -> PreTrainedModel:
    """Learn the chosen answers and their odds over the rejected at once. Source: Hong et al., arXiv 2403.07691."""
    method = PairMethod(ORPOTrainer, configuration, pair_rows, has_reference=False)
    return train_on_pairs(params, files, run, method)


def configuration(params: ORPOParams, settings: Settings) -> ORPOConfig:
    """TRL's arguments; `beta` is the paper's λ."""
    return ORPOConfig(**settings, beta=params.beta, max_length=params.max_length + ENDS)
