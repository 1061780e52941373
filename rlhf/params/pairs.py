"""The sections of policies that learn from preference pairs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf.params.fields import NonNegativeFloat, PositiveFloat, PositiveInt, Section, Share
from rlhf.params.training import TrainingParams

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
"""The share of labels that a loss supposes wrong."""


class PairParams(TrainingParams):
    """What every algorithm that learns from preference pairs needs.

    `contradicted` says what becomes of pairs whose rejected answer the reward model scores higher; `ledger` what
    becomes of those with an answer longer than `max_length` tokens, prompt included.
    """

    algorithm: str
    contradicted: Literal["keep", "drop", "relabel"]
    beta: PositiveFloat
    epochs: PositiveFloat
    max_length: PositiveInt


class DPOLossParams(Section):
    """What DPO minimises; docs/methods/dpo.md has the losses.

    `sft_weight` is the weight of the chosen answers' own negative log-likelihood beside the preference loss; `ld_alpha`
    that of the log-probabilities of tokens beyond the shorter answer's length, null for 1.
    """

    beta: PositiveFloat
    loss: Literal[
        "sigmoid",
        "hinge",
        "ipo",
        "robust",
        "sigmoid_norm",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "aot",
        "apo_zero",
        "apo_down",
        "discopop",
    ]
    sft_weight: NonNegativeFloat
    label_smoothing: Smoothing
    ld_alpha: Share | None

    @model_validator(mode="after")
    def _smoothing_counts(self) -> Self:
        _refuse_idle_smoothing(self.loss, self.label_smoothing, ("robust", "exo_pair", "aot"))
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError(
                "loss is 'exo_pair' but label_smoothing is 0, whose logarithm it takes; set label_smoothing to 0.001"
            )
        return self


class DPOParams(PairParams, DPOLossParams):
    """Direct preference optimisation over TRL's trainer."""

    algorithm: Literal["dpo"]


class KTOParams(PairParams):
    """Kahneman-Tversky optimisation over TRL's trainer; `batch_size` counts answers, two of each pair."""

    algorithm: Literal["kto"]
    loss: Literal["kto", "apo_zero_unpaired"]
    desirable_weight: PositiveFloat
    undesirable_weight: PositiveFloat

    @model_validator(mode="after")
    def _has_neighbours(self) -> KTOParams:
        if self.loss == "kto" and self.batch_size == 1:
            raise ValueError(
                "batch_size is 1 but loss 'kto' estimates its KL from the other answers of a batch; raise batch_size"
            )
        return self


class ORPOParams(PairParams):
    """Odds ratio preference optimisation over TRL's trainer; `beta` weighs the odds ratio (the paper's λ)."""

    algorithm: Literal["orpo"]


class CPOParams(PairParams):
    """Contrastive preference optimisation over TRL's trainer, and SimPO, whose margin is `gamma`.

    `sft_weight` is the weight of the chosen answers' own negative log-likelihood: 1 in CPO, 0 in SimPO.
    """

    algorithm: Literal["cpo"]
    loss: Literal["sigmoid", "hinge", "ipo", "simpo"]
    gamma: NonNegativeFloat | None
    sft_weight: NonNegativeFloat
    label_smoothing: Smoothing

    @model_validator(mode="after")
    def _loss_takes_them(self) -> CPOParams:
        _refuse_idle_smoothing(self.loss, self.label_smoothing, ("sigmoid", "simpo"))
        if self.loss == "simpo" and self.gamma is None:
            raise ValueError("loss is 'simpo' but gamma is null; give the margin, such as 0.5")
        if self.loss != "simpo" and self.gamma is not None:
            raise ValueError(f"gamma is {self.gamma:g} but loss {self.loss!r} has no margin; set gamma to null")
        return self


def _refuse_idle_smoothing(loss: str, label_smoothing: float, takers: tuple[str, ...]) -> None:
    if label_smoothing and loss not in takers:
        raise ValueError(
            f"label_smoothing is {label_smoothing:g} but loss {loss!r} takes no notice of it; "
            f"set label_smoothing to 0, or loss to {' or '.join(takers)}"
        )
