"""The section `policies`: how a policy learns to get what is rewarded."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf.params.fields import (
    LearningRate,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Temperature,
)
from rlhf.params.pairs import CPOParams, DPOLossParams, DPOParams, KTOParams, ORPOParams
from rlhf.params.rewards import RewardMix, Text
from rlhf.params.training import TrainingParams


class SamplingParams(Section):
    """How answers are drawn during online training."""

    max_new_tokens: PositiveInt
    temperature: Temperature


class VLLMParams(Section):
    """Answers sampled by vLLM, as TRL has it: `colocate` on the devices of the training, of whose memory it takes the
    share `gpu_memory_utilization`; `server` by one that runs at `server_base_url`.
    """

    mode: Literal["colocate", "server"]
    server_base_url: Text | None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)]
    tensor_parallel_size: PositiveInt
    max_model_length: PositiveInt | None
    enable_sleep_mode: bool

    @model_validator(mode="after")
    def _server_has_an_address(self) -> VLLMParams:
        if (self.mode == "server") != (self.server_base_url is not None):
            raise ValueError(
                f"vllm.mode is {self.mode} but server_base_url is {self.server_base_url or 'null'}; give a server its "
                "address, such as http://localhost:8000, and colocate null"
            )
        return self


class OnlineParams(SamplingParams):
    """How answers are drawn where every step needs new ones: by transformers, or by vLLM."""

    vllm: VLLMParams | None


class DynamicSampling(Section):
    """Groups whose rewards are all equal make room for those of further prompts, `max_refills` times per step."""

    max_refills: PositiveInt


class AdaptiveBeta(Section):
    """β follows the KL: `target` in nats per answer, `horizon` in answers."""

    target: PositiveFloat
    horizon: PositiveInt


class PPOParams(TrainingParams, OnlineParams):
    """Proximal policy optimisation and its relatives, one rollout of `batch_size` answers per step.

    `advantage` says what an answer is compared with: a critic (`gae`), its group of `group_size` answers (`group`,
    `leave_one_out`), or nothing (`reward`); with `likelihood` not rewards are compared but an answer's own likelihood
    with its group's. The critic's values count only with `gae`. docs/methods/ppo.md has the formulas.
    """

    algorithm: Literal["ppo"]
    steps: PositiveInt
    rewards: RewardMix
    score_scaling: Literal["none", "whiten", "running"]
    score_clip: PositiveFloat | None
    missing_eos_penalty: NonNegativeFloat
    mask_truncated: bool
    beta: NonNegativeFloat
    adaptive_beta: AdaptiveBeta | None
    kl_in: Literal["reward", "loss"]
    kl_estimator: Literal["k1", "k2", "k3", "full"]
    advantage: Literal["gae", "group", "leave_one_out", "reward", "likelihood"]
    group_size: PositiveInt
    dynamic_sampling: DynamicSampling | None
    gamma: Share
    gae_lambda: Share
    whiten_advantages: bool
    critic: Literal["separate", "shared", "adapter"]
    critic_learning_rate: LearningRate
    value_clip_range: PositiveFloat
    value_coefficient: NonNegativeFloat
    clip_range: Annotated[float, Field(gt=0, lt=1)]
    clip_range_high: PositiveFloat | None
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None
    entropy_coefficient: NonNegativeFloat
    update_epochs: PositiveInt
    minibatches: PositiveInt
    target_kl: PositiveFloat | None

    @model_validator(mode="after")
    def _precision_and_adapter_fit(self) -> PPOParams:
        if self.adapter and self.adapter.quantise:
            raise ValueError("ppo does not train over a quantised base model; set adapter.quantise to null")
        if self.precision == "bf16" and self.adapter is None:
            raise ValueError("ppo trains all weights in fp32 only; set precision to fp32, or use an adapter")
        if self.critic == "adapter" and self.adapter is None:
            raise ValueError("critic is 'adapter' but adapter is null; give an adapter, or set critic to shared")
        if self.critic == "adapter" and self.gradient_checkpointing:
            raise ValueError(
                "critic is 'adapter' but gradient_checkpointing would recompute one adapter's states under the "
                "other; set gradient_checkpointing to false, or critic to separate"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> PPOParams:
        if self.batch_size % (self.minibatches * self.gradient_accumulation_steps):
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by minibatches × gradient_accumulation_steps "
                f"= {self.minibatches} × {self.gradient_accumulation_steps}; change one of the three"
            )
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by group_size {self.group_size}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _groups_compare(self) -> PPOParams:
        if self.advantage in ("group", "leave_one_out", "likelihood") and self.group_size == 1:
            raise ValueError(
                f"advantage is {self.advantage!r}, which compares the answers to one prompt, but group_size is 1; "
                "raise group_size"
            )
        if self.dynamic_sampling and self.advantage not in ("group", "leave_one_out"):
            raise ValueError(
                f"dynamic_sampling drops groups with equal rewards, but with advantage {self.advantage!r} they teach "
                "too; set dynamic_sampling to null, or advantage to group or leave_one_out"
            )
        return self

    @model_validator(mode="after")
    def _leash_holds(self) -> PPOParams:
        if self.kl_in == "loss" and self.kl_estimator == "k1" and self.beta:
            raise ValueError(
                "kl_estimator is 'k1' but its gradient in the loss is zero on average; "
                "set kl_estimator to k2, k3 or full, or kl_in to reward"
            )
        if self.kl_in == "reward" and self.advantage == "group" and self.beta:
            raise ValueError(
                "kl_in is 'reward' but advantage 'group' divides by the group's deviation, which blows the KL up where "
                "scores are equal; set kl_in to loss, or advantage to leave_one_out"
            )
        if self.adaptive_beta and not self.beta:
            raise ValueError("beta is 0 but adaptive_beta multiplies it; give beta its first value, such as 0.05")
        return self


class GroupParams(TrainingParams, OnlineParams):
    """What every algorithm needs that compares the answers of a group; `batch_size` counts answers.

    `clip_range_high` null stands for `clip_range`.
    """

    algorithm: str
    steps: PositiveInt
    rewards: RewardMix
    beta: NonNegativeFloat
    clip_range: Annotated[float, Field(gt=0, lt=1)]
    clip_range_high: PositiveFloat | None
    group_size: Annotated[int, Field(ge=2)]
    update_epochs: PositiveInt
    mask_truncated: bool

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.batch_size * self.gradient_accumulation_steps % self.group_size:
            raise ValueError(
                f"batch_size × gradient_accumulation_steps = {self.batch_size * self.gradient_accumulation_steps} "
                f"is not divisible by group_size {self.group_size}; change one of them"
            )
        return self


class GRPOParams(GroupParams):
    """Group-relative policy optimisation over TRL's trainer.

    With `loss: cispo` the ratio itself is capped at `clip_range_high`; with the others at 1 + `clip_range_high`.
    """

    algorithm: Literal["grpo"]
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"]
    importance_sampling_level: Literal["token", "sequence"]
    scale_rewards: Literal["group", "batch", "none"]
    dynamic_sampling: DynamicSampling | None

    @model_validator(mode="after")
    def _ratio_fits_the_loss(self) -> GRPOParams:
        if self.importance_sampling_level == "sequence" and self.loss != "grpo":
            raise ValueError(
                f"importance_sampling_level is 'sequence' but loss {self.loss!r} sums over tokens, so that long "
                "answers would count more; set loss to grpo, or importance_sampling_level to token"
            )
        if self.loss == "cispo" and (self.clip_range_high is None or self.clip_range_high <= 1):
            raise ValueError(
                f"clip_range_high is {self.clip_range_high or 'null'} but loss 'cispo' caps the ratio itself there, "
                "which is 1 at first; set clip_range_high above 1, such as 5"
            )
        return self

    @model_validator(mode="after")
    def _scale_fits_the_batch(self) -> GRPOParams:
        if self.dynamic_sampling and self.scale_rewards == "batch":
            raise ValueError(
                "scale_rewards is 'batch', a deviation in which the groups that dynamic_sampling drops would count; "
                "set scale_rewards to group or none, or dynamic_sampling to null"
            )
        return self


class RLOOParams(GroupParams):
    """REINFORCE with a leave-one-out baseline over TRL's trainer; the KL is a part of the reward."""

    algorithm: Literal["rloo"]
    whiten_advantages: bool


class IterativeDPOParams(TrainingParams, SamplingParams, DPOLossParams):
    """DPO on the policy's own answers, in rounds: sample, let `rewards` rank, train on best against worst, repeat.

    `reference` is the SFT model or the policy that the last round ended with. `epochs`, the learning rate's schedule
    and its warm-up are those of a round.
    """

    algorithm: Literal["iterative_dpo"]
    rounds: PositiveInt
    prompts_per_round: PositiveInt
    group_size: Annotated[int, Field(ge=2)]
    rewards: RewardMix
    reference: Literal["sft", "previous"]
    epochs: PositiveFloat


PolicyParams = Annotated[
    PPOParams | DPOParams | KTOParams | ORPOParams | CPOParams | GRPOParams | RLOOParams | IterativeDPOParams,
    Field(discriminator="algorithm"),
]
