"""Direct preference optimisation and its losses: a thin layer over TRL's trainer."""

from __future__ import annotations

from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from rlhf.params import DPOParams
from rlhf.policies import PolicyFiles, Run, Settings
from rlhf.policies.pairs import PairMethod, pair_rows, train_on_pairs


def train_dpo(params: DPOParams, files: PolicyFiles, run: Run) -> PreTrainedModel:
    """Learn from pairs alone, the frozen SFT model as reference. Source: Rafailov et al., arXiv 2305.18290."""
    method = PairMethod(DPOTrainer, configuration, pair_rows, has_reference=True)
    return train_on_pairs(params, files, run, method)


def configuration(params: DPOParams, settings: Settings) -> DPOConfig:
    """TRL's arguments; the chosen answers' own loss is a second one beside the preference loss."""
    return DPOConfig(
        **settings,
        loss_type=[params.loss, "sft"],
        loss_weights=[1.0, params.sft_weight],
        beta=params.beta,
        label_smoothing=params.label_smoothing,
        ld_alpha=params.ld_alpha,
        max_length=params.max_length,
        precompute_ref_log_probs=params.adapter is None,
    )
