"""The sections of the supervised stages, `sft`, `embed` and `reward`, and what every training needs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.params.fields import (
    LearningRate,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
)


class AdapterParams(Section):
    """LoRA, or QLoRA where `quantise` is `nf4` (needs a GPU and bitsandbytes)."""

    rank: PositiveInt
    alpha: PositiveInt
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: list[str] | Literal["all-linear"]
    quantise: Literal["nf4"] | None


class TrainingParams(Section):
    """What every gradient descent needs.

    `precision: bf16` computes in bf16. Weights that are trained stay in fp32; those frozen under an adapter do not.
    """

    learning_rate: LearningRate
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    warmup_share: Share
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat
    batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt
    gradient_checkpointing: bool
    precision: Literal["fp32", "bf16"]
    adapter: AdapterParams | None


class SFTParams(TrainingParams):
    """Supervised fine-tuning on demonstrations, loss on the completion alone.

    Afterwards the model answers held-out prompts greedily; where fewer than `min_stop_rate` of the answers end by
    themselves within `max_length` tokens, the pipeline stops.
    """

    epochs: PositiveFloat
    max_length: PositiveInt
    evaluations: PositiveInt
    patience: PositiveInt
    min_stop_rate: Share


class LedgerParams(Section):
    """What becomes of rows that are longer than a training allows, and how large a share of a file may be lost.

    Lost is what is left out or cut. `truncate` cuts demonstrations; pairs, rated answers and prompts are left out all
    the same, as an answer that is compared must be whole.
    """

    on_too_long: Literal["raise", "drop", "truncate"]
    max_lost_share: Share


class TransportParams(Section):
    """What the selective objectives' plan is made of; `rlhf.selective.selective_loss` has the formulas.

    `self_match_penalty` is the price of matching a prediction with its own label, in units of the cost, whose distances
    are about 1: 10 forbids it as far as possible. `neighbours` null stands for all, `regularisation` null for the exact
    plan.
    """

    label_weight: PositiveFloat
    semantic_cost: Literal["squared_euclidean", "cosine"]
    scale: Literal["max", "median", "local"]
    label_cost: Literal["cross_entropy", "absolute", "symmetric"]
    self_match_penalty: NonNegativeFloat
    neighbours: PositiveInt | None
    regularisation: PositiveFloat | None


class EmbedParams(Section):
    """Frozen embeddings of every answer. `model` is `sft`, or a folder or hub id of another causal model.

    A row with an answer longer than `max_length` tokens of that model does not train the reward model either: `ledger`
    says whether it is left out or refused.
    """

    model: Annotated[str, Field(min_length=1)]
    max_length: PositiveInt
    batch_size: PositiveInt
    precision: Literal["fp32", "bf16"]


class RatingParams(Section):
    """The scale of ratings, and which are good: those above the `median`, or from the `mean` or a number on."""

    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    positive: Literal["mean", "median"] | Annotated[float, Field(allow_inf_nan=False)]

    @model_validator(mode="after")
    def _ordered(self) -> RatingParams:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g} but high is {self.high:g}; give the least rating and the greatest")
        if not isinstance(self.positive, str) and not self.low < self.positive <= self.high:
            raise ValueError(
                f"positive is {self.positive:g}, but ratings go from {self.low:g} to {self.high:g}; "
                "choose a number above the least, mean or median"
            )
        return self


class RewardParams(TrainingParams):
    """The reward model.

    `ratings` takes ratings instead of preferences as labels; `frozen` trains only the score head, on the embeddings of
    the stage embed, with `hidden` layers of these sizes. `noise_rate` is the share of wrong labels; or `estimate`, by
    what the embeddings foretell; or `agreement`, by how often annotators of the same answers agree. `group` names the
    column by which labels may be wrong together: topic, source or annotator. `margin` names a column of numbers by
    which the chosen answer's reward should be ahead (bradley_terry). `center_rewards_coefficient` weighs the square of
    the two rewards' sum.
    """

    ratings: RatingParams | None
    frozen: bool
    hidden: list[PositiveInt]
    objective: Literal[
        "bradley_terry",
        "label_smoothing",
        "unbiased",
        "symmetric",
        "gce",
        "trimmed",
        "co_teaching",
        "cleanlab",
        "full_transport",
        "selective_plain",
        "selective",
    ]
    group: Annotated[str, Field(min_length=1)] | None
    noise_rate: Annotated[float, Field(ge=0, lt=0.5)] | Literal["estimate", "agreement"]
    margin: Annotated[str, Field(min_length=1)] | None
    center_rewards_coefficient: NonNegativeFloat
    transport: TransportParams
    warmup_epochs: NonNegativeFloat
    ramp_epochs: NonNegativeFloat
    epochs: PositiveFloat
    evaluations: PositiveInt
    judge: bool

    @model_validator(mode="after")
    def _fits_together(self) -> RewardParams:
        if self.margin is not None and (self.objective != "bradley_terry" or self.ratings):
            what = "ratings have" if self.ratings else f"{self.objective} has"
            raise ValueError(f"{what} no margin; set margin to null, or train by bradley_terry on preferences")
        if self.center_rewards_coefficient and self.ratings:
            raise ValueError("ratings have one reward each; set center_rewards_coefficient to 0")
        if self.hidden and not self.frozen:
            raise ValueError(f"hidden is {self.hidden} but frozen is false; set frozen to true, or hidden to []")
        if self.frozen and (self.adapter or self.precision == "bf16" or self.gradient_checkpointing):
            raise ValueError(
                "frozen trains a score head alone, in fp32; set adapter to null, precision to fp32 and "
                "gradient_checkpointing to false"
            )
        return self
