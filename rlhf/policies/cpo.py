"""Contrastive preference optimisation and SimPO: a thin layer over TRL's trainer."""

from __future__ import annotations

from transformers import PreTrainedModel
from trl.experimental.cpo import CPOConfig, CPOTrainer

from rlhf.params import CPOParams
from rlhf.policies import PolicyFiles, Run, Settings
from rlhf.policies.pairs import ENDS, PairMethod, pair_rows, train_on_pairs


def train_cpo(params: CPOParams, files: PolicyFiles, run: Run) -> PreTrainedModel:
    """Learn from pairs without a reference. Sources: Xu et al., arXiv 2401.08417; SimPO: Meng et al., 2405.14734."""
    method = PairMethod(CPOTrainer, configuration, pair_rows, has_reference=False)
    return train_on_pairs(params, files, run, method)


def configuration(params: CPOParams, settings: Settings) -> CPOConfig:
    """TRL's arguments; only SimPO has a `gamma`."""
    return CPOConfig(
        **settings,
        loss_type=params.loss,
        beta=params.beta,
        simpo_gamma=params.gamma or 0.0,
        cpo_alpha=params.sft_weight,
        label_smoothing=params.label_smoothing,
        max_length=params.max_length + ENDS,
    )
