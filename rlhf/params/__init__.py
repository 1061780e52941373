"""Types and bounds of every value in `params.yaml`; the values themselves stand in that file alone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.params.data import (
    DataParams,
    FileSource,
    HubSource,
    NoiseParams,
    PrepareParams,
    PretrainingParams,
    QualityLimits,
    QualityParams,
    ShapeName,
    Source,
    ValidateParams,
    VoteMethod,
    WorldParams,
    WorldSource,
    kind_of_shape,
)
from rlhf.params.fields import (
    Key,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Temperature,
)
from rlhf.params.pairs import CPOParams, DPOLossParams, DPOParams, KTOParams, ORPOParams, PairParams
from rlhf.params.policies import (
    AdaptiveBeta,
    DynamicSampling,
    GroupParams,
    GRPOParams,
    IterativeDPOParams,
    OnlineParams,
    PolicyParams,
    PPOParams,
    RLOOParams,
    SamplingParams,
    VLLMParams,
)
from rlhf.params.probe import Limits, ProbeParams, ShareLimits
from rlhf.params.rewards import (
    Gold,
    ModelReward,
    Place,
    RewardMix,
    RewardSection,
    Tag,
    files_read,
    inputs_read,
    reads_reward_model,
)
from rlhf.params.training import (
    AdapterParams,
    EmbedParams,
    LedgerParams,
    RatingParams,
    RewardParams,
    SFTParams,
    TrainingParams,
    TransportParams,
)

__all__ = [
    "AdapterParams",
    "AdaptiveBeta",
    "CPOParams",
    "DPOLossParams",
    "DPOParams",
    "DataParams",
    "DynamicSampling",
    "EmbedParams",
    "EvaluateParams",
    "FileSource",
    "GRPOParams",
    "GroupParams",
    "IterativeDPOParams",
    "HubSource",
    "KTOParams",
    "LedgerParams",
    "Limits",
    "NoiseParams",
    "ORPOParams",
    "OnlineParams",
    "PPOParams",
    "PairParams",
    "Params",
    "Place",
    "PolicyParams",
    "PrepareParams",
    "PretrainingParams",
    "ProbeParams",
    "QualityLimits",
    "QualityParams",
    "PromoteParams",
    "RLOOParams",
    "RatingParams",
    "RewardMix",
    "RewardParams",
    "RewardSection",
    "SFTParams",
    "SamplingParams",
    "Section",
    "ShapeName",
    "ShareLimits",
    "Source",
    "Tag",
    "TrainingParams",
    "TransportParams",
    "VLLMParams",
    "ValidateParams",
    "VoteMethod",
    "WatchParams",
    "WorldParams",
    "WorldSource",
    "files_read",
    "inputs_read",
    "kind_of_shape",
    "reads_reward_model",
]


class WatchParams(Section):
    """Gold beside proxy while policies train: so many looks at even steps, on held-out prompts behind evaluate's.

    An over-optimised policy (gold falls, proxy rises) trains on or ends there; the weights of the best look are kept in
    either case. rlhf.watch has the details.
    """

    evaluations: PositiveInt
    prompts: PositiveInt
    on_over_optimisation: Literal["warn", "stop"]


class EvaluateParams(Section):
    """The common yardstick.

    `gold` is what counts and no policy is trained on: a reward of any kind but the reward model, or `judge`, a second
    reward model no policy has seen. `best_of` answers of the SFT model per prompt make the line that policies are
    compared with, null none; `kl_budget` is up to which KL, in nats per answer, the area under the frontier reaches.
    """

    gold: Gold
    prompts: PositiveInt
    max_new_tokens: PositiveInt
    temperature: Temperature
    batch_size: PositiveInt
    samples_shown: PositiveInt
    best_of: Annotated[int, Field(ge=2)] | None
    kl_budget: PositiveFloat
    watch: WatchParams | None


class PromoteParams(Section):
    """The gate a policy must pass, and the names in the registry."""

    min_win_rate_low: Share
    policy_name: Annotated[str, Field(min_length=1)]
    reward_name: Annotated[str, Field(min_length=1)]


class Params(Section):
    """All of `params.yaml`; a stage reads its own section and `seed`."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    prepare: PrepareParams
    validate_: ValidateParams = Field(alias="validate")
    ledger: LedgerParams
    sft: SFTParams
    embed: EmbedParams
    reward: RewardParams
    probe: ProbeParams
    policies: Annotated[dict[Key, PolicyParams], Field(min_length=1)]
    evaluate: EvaluateParams
    promote: PromoteParams

    @model_validator(mode="after")
    def _sections_fit(self) -> Params:
        if "sft" in self.policies:
            raise ValueError("policies.sft is the name of the model that policies are compared with; choose another")
        if self.reward.ratings and self.prepare.data.ratings is None:
            raise ValueError("reward.ratings gives a scale but prepare.data.ratings is null; give the ratings a source")
        if self.prepare.data.preferences is None:
            needy = sorted(
                name
                for name, policy in self.policies.items()
                if isinstance(policy, PairParams) or (reads_reward_model(policy.rewards) and not self.reward.ratings)
            )
            if needy:
                raise ValueError(
                    f"prepare.data.preferences is null but policies.{needy[0]} needs preferences; "
                    "give a source or drop the policy"
                )
        self._check_prompts_suffice()
        if isinstance(self.evaluate.gold, ModelReward):
            raise ValueError("evaluate.gold is the reward model, which policies are trained on; take judge, or a rule")
        if self.evaluate.gold == "judge" and not self.reward.judge:
            raise ValueError("evaluate.gold is 'judge' but reward.judge is false; set reward.judge to true")
        return self

    def _check_prompts_suffice(self) -> None:
        world, source = self.prepare.world, self.prepare.data.prompts
        is_watched = self.evaluate.watch is not None and isinstance(source, WorldSource)
        if world and is_watched and world.test_prompts <= self.evaluate.prompts:
            raise ValueError(
                f"prepare.world.test_prompts is {world.test_prompts}, all of which evaluate.prompts takes, and "
                "evaluate.watch looks at those behind them; raise the first, or set evaluate.watch to null"
            )
