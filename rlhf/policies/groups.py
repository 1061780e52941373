"""Learning from rewards of groups of answers, by whichever of TRL's trainers: the common frame and the rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from rlhf.models import (
    load_tokenizer,
    set_determinism,
    weight_settings,
)
from rlhf.params import GroupParams
from rlhf.policies import PolicyFiles, Run, Settings
from rlhf.policies.objectives import equal_groups
from rlhf.policies.over_trl import train_over_trl
from rlhf.policies.prompts import read_prompts
from rlhf.policies.vllm import check_vllm, trl_settings
from rlhf.rewards.building import build_rewards
from rlhf.scoring import Reward, check_rows, mixed_reward


@dataclass(frozen=True)
class GroupMethod:
    """One of TRL's trainers, and its configuration from params and common settings."""

    trainer: Callable[..., Any]
    configuration: Callable[[Any, Settings], Any]


def train_on_groups(params: GroupParams, files: PolicyFiles, run: Run, method: GroupMethod) -> PreTrainedModel:
    """The SFT model after `method` has learnt which of its answers to a prompt are rewarded more than the others."""
    check_vllm(params)
    set_determinism(run.seed)
    tokenizer = load_tokenizer(files.sft)
    rewards = build_rewards(params.rewards, files, params.batch_size)
    prompts = read_prompts(files.prompts, tokenizer, params, AutoConfig.from_pretrained(files.sft), run.ledger)
    check_rows(rewards, prompts)
    rows = [{key: value for key, value in row.items() if key != "id"} for row in prompts]

    def arguments(settings: Settings) -> dict[str, Any]:
        settings = settings | group_settings(params) | {"reward_weights": [reward.weight for reward in rewards]}
        return {
            # The path, not the model: with beta > 0 TRL loads the reference from where the policy came from.
            "model": str(files.sft),
            "reward_funcs": [reward_function(reward) for reward in rewards],
            "args": method.configuration(params, settings),
            "train_dataset": Dataset.from_list(rows),
            "processing_class": tokenizer,
        }

    return train_over_trl(params, files, run, method.trainer, arguments)


class EqualGroupsCounted:
    """Over one of TRL's group trainers: knows the rewards of a batch, and which of its groups have equal ones.

    TRL asks for a deviation below 10⁻⁸, and that of eight rewards of 1.2 is 10⁻⁷ by rounding.
    """

    num_generations: int
    reward_weights: Tensor

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        over: Any = super()
        self._rewards: Tensor = over._calculate_rewards(*arguments)
        return self._rewards

    def equal_groups(self) -> Tensor:
        """(groups,) of all processes, of the batch that was sampled last."""
        return equal_groups(self._rewards @ self.reward_weights.to(self._rewards), self.num_generations)


def group_settings(params: GroupParams) -> Settings:
    """How answers are drawn, and how far an update may go."""
    return {
        "max_steps": params.steps,
        "beta": params.beta,
        "epsilon": params.clip_range,
        "epsilon_high": params.clip_range_high,
        "num_generations": params.group_size,
        "num_iterations": params.update_epochs,
        "max_completion_length": params.max_new_tokens,
        "mask_truncated_completions": params.mask_truncated,
        "temperature": params.temperature,
        **trl_settings(params),
        "model_init_kwargs": weight_settings(params),
    }


def reward_function(reward: Reward) -> Callable[..., list[float]]:
    """The reward as TRL calls it, checked as everywhere: a missing or non-finite value is an error."""

    def score(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        _, parts = mixed_reward(
            [reward], prompts, completions, {k: v for k, v in columns.items() if isinstance(v, list)}
        )
        return parts[reward.name]

    score.__name__ = reward.name
    return score
