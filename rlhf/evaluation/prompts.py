"""Held-out prompts, and what a model's answers to them are like: texts, rewards, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf.data.formats import Row, read_rows, without_truth
from rlhf.encoding import encode_prompt
from rlhf.errors import UserError
from rlhf.evaluation.comparison import Estimate, estimate_mean, estimate_share
from rlhf.evaluation.generation import Completion, Decoding, generate
from rlhf.evaluation.kl import completion_log_probs
from rlhf.params import EvaluateParams, files_read, inputs_read
from rlhf.params.rewards import ModelReward
from rlhf.rewards.building import build_reward
from rlhf.scoring import Reward, RewardModel, mixed_reward


@dataclass(frozen=True)
class HeldOutPrompts:
    """Rows with prompts, and how every model answers them."""

    params: EvaluateParams
    seed: int
    tokenizer: Any
    rows: list[Row]

    def answer(self, model: Any, temperature: float, draw: int = 0) -> list[Completion]:
        """One answer of the model to every prompt; each `draw` has luck of its own."""
        seed = self.seed + 7_777_777 * draw
        decoding = Decoding(self.params.max_new_tokens, temperature, self.params.batch_size, seed)
        return generate(model, self.tokenizer, [row["prompt"] for row in self.rows], decoding)

    def reward(self, reward: Reward, answers: Sequence[Completion]) -> list[float]:
        """The reward of each answer times its weight, checked to be a number."""
        names = {name for row in self.rows for name in row} - {"id", "prompt"}
        columns = {name: [row.get(name) for row in self.rows] for name in names}
        prompts = [row["prompt"] for row in self.rows]
        return mixed_reward([reward], prompts, [answer.text for answer in answers], columns)[0]

    def log_probs(self, model: Any, answers: Sequence[Completion]) -> list[Tensor]:
        """The log-probabilities (tokens,) of each answer under the model, at the temperature of sampling."""
        prompts = [encode_prompt(self.tokenizer, row["prompt"]) for row in self.rows]
        sequences = [(ids, answer.token_ids) for ids, answer in zip(prompts, answers, strict=True)]
        return completion_log_probs(model, sequences, self.params.temperature, self.params.batch_size)


def read_prompts(path: Path, first: int, count: int) -> list[Row]:
    """`count` held-out rows of a file from the row `first` on, or those there are, without the true labels.

    Raises UserError where there are none.
    """
    chosen = [without_truth(row) for row in read_rows(path)[first : first + count]]
    if not chosen:
        taken = f" beyond the {first} that evaluate.prompts takes" if first else ""
        raise UserError(
            f"{path} holds no held-out prompt{taken}; raise prepare.data.prompts.test_share (of the embedded world: "
            "prepare.world.test_prompts), or lower evaluate.prompts"
        )
    return chosen


@dataclass(frozen=True)
class GoldFiles:
    """What the gold reward may read: the judge, the SFT model's tokenizer, and files whose paths begin at `root`."""

    sft: Path
    judge: Path
    root: Path

    @property
    def reward(self) -> Path:
        """The reward model that speaks: never the one that policies are trained on."""
        return self.judge


def gold_reward(params: EvaluateParams, files: GoldFiles) -> Reward:
    """The reward that counts and that no policy is trained on."""
    if params.gold == "judge":
        return build_reward("judge", ModelReward(kind="reward_model", weight=1.0), files, params.batch_size)
    return build_reward(params.gold.kind, params.gold, files, params.batch_size)


def gold_files(params: EvaluateParams) -> list[str]:
    """The files and folders, as params name them, that the gold reward is made from; the judge is none of them."""
    return [] if params.gold == "judge" else files_read({"gold": params.gold})


def gold_inputs(params: EvaluateParams, files: GoldFiles) -> list[Path]:
    """The files and folders that the gold reward is made from."""
    if params.gold == "judge":
        return [files.judge]
    return inputs_read({"gold": params.gold}, files.root)


def estimate_gold(rewards: Sequence[float]) -> Estimate:
    """The mean gold reward with its interval: of right or wrong answers, or of scores."""
    return estimate_share(rewards) if set(rewards) <= {0.0, 1.0} else estimate_mean(rewards)


def describe_answers(answers: Sequence[Completion]) -> dict[str, float]:
    """Tokens per answer, the end token included, and the share of answers that ended by themselves."""
    return {
        "mean_tokens": sum(len(answer.token_ids) for answer in answers) / len(answers),
        "stop_rate": sum(answer.ended for answer in answers) / len(answers),
    }


def proxy_reward(params: EvaluateParams, reward: Path) -> Reward:
    """The reward model that policies may have been trained on."""
    return Reward("reward_model", RewardModel(reward, params.batch_size), 1.0)
