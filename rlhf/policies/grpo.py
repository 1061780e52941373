"""Group-relative policy optimisation: a thin layer over TRL's trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from rlhf.curves import Log
from rlhf.data.formats import training_rows
from rlhf.models import load_tokenizer, lora_config, set_determinism, trainer_settings, weight_settings
from rlhf.params import GRPOParams
from rlhf.policies import PolicyFiles
from rlhf.scoring import Reward, build_rewards, mixed_reward
from rlhf.training import CurveReporter, finished_policy


def train_grpo(params: GRPOParams, files: PolicyFiles, seed: int, log: Log) -> PreTrainedModel:
    """Advantages from groups of answers to one prompt, no critic. Source: Shao et al., arXiv 2402.03300."""
    set_determinism(seed)
    tokenizer = load_tokenizer(files.sft)
    rewards = build_rewards(params.rewards, files.reward, params.batch_size)
    rows = [{key: value for key, value in row.items() if key != "id"} for row in training_rows(files.prompts)]
    functions: list[Any] = [reward_function(reward) for reward in rewards]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            # The path, not the model: with beta > 0 TRL loads the reference from where the policy came from.
            model=str(files.sft),
            reward_funcs=functions,
            args=_configuration(params, [reward.weight for reward in rewards], seed, Path(folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora_config(params.adapter, "CAUSAL_LM"),
            callbacks=[CurveReporter(log)],
        )
        trainer.train()
    return finished_policy(trainer.model, params, files.sft, tokenizer)


def _configuration(params: GRPOParams, weights: list[float], seed: int, folder: Path) -> GRPOConfig:
    return GRPOConfig(
        **trainer_settings(params, seed, folder),
        max_steps=params.steps,
        loss_type=params.loss,
        beta=params.beta,
        epsilon=params.clip_range,
        num_generations=params.group_size,
        num_iterations=params.update_epochs,
        scale_rewards=params.scale_rewards,
        max_completion_length=params.max_new_tokens,
        temperature=params.temperature,
        reward_weights=weights,
        model_init_kwargs=weight_settings(params),
    )


def reward_function(reward: Reward) -> Callable[..., list[float]]:
    """The reward as TRL calls it, checked as everywhere: a missing or non-finite value is an error."""

    def score(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        _, parts = mixed_reward(
            [reward], prompts, completions, {k: v for k, v in columns.items() if isinstance(v, list)}
        )
        return parts[reward.name]

    score.__name__ = reward.name
    return score
