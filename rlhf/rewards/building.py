"""From the section `rewards` to reward functions with their settings bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rlhf.models import load_tokenizer
from rlhf.params import RewardSection
from rlhf.params.rewards import (
    ClassifierReward,
    FunctionReward,
    LengthReward,
    LengthStepsReward,
    MathReward,
    ModelReward,
    SQLReward,
)
from rlhf.rewards.answers import answer_reward, integer_reward, number_reward
from rlhf.rewards.forms import format_reward, tag_count_reward, tag_points_reward
from rlhf.rewards.style import (
    Measure,
    apology_reward,
    keywords_reward,
    language_reward,
    language_steps_reward,
    length_reward,
    length_steps_reward,
    refusal_reward,
    repetition_reward,
)
from rlhf.scoring import Reward, RewardFunction, RewardModel

BY_RULE: dict[str, RewardFunction] = {
    "answer": answer_reward,
    "number": number_reward,
    "integer": integer_reward,
    "format": format_reward,
    "tag_count": tag_count_reward,
    "tag_points": tag_points_reward,
    "length": length_reward,
    "length_steps": length_steps_reward,
    "language": language_reward,
    "language_steps": language_steps_reward,
    "keywords": keywords_reward,
    "repetition": repetition_reward,
    "refusal": refusal_reward,
    "apology": apology_reward,
}
"""What is a function of its section's values and the texts alone, by kind."""


class RewardFiles(Protocol):
    """What rewards may read: the model whose tokenizer counts, the reward model, and where other paths begin."""

    @property
    def sft(self) -> Path: ...
    @property
    def reward(self) -> Path: ...
    @property
    def root(self) -> Path: ...


def build_rewards(mix: Mapping[str, RewardSection], files: RewardFiles, batch_size: int) -> list[Reward]:
    """The rewards that `mix` names, each with its settings bound, in the order given.

    Raises UserError where a file, model or function that the mix names is not there or not fit.
    """
    return [build_reward(name, section, files, batch_size) for name, section in mix.items()]


def build_reward(name: str, section: RewardSection, files: RewardFiles, batch_size: int) -> Reward:
    """One of them. Raises UserError as `build_rewards`."""
    check = None
    match section:
        case ModelReward():
            function = RewardModel(files.reward, batch_size)
        case ClassifierReward():
            from rlhf.rewards.classifiers import ClassifierScore, load_classifier

            classifier = load_classifier(section.model, files.root, batch_size)
            function = ClassifierScore(classifier, section.label, section.output, section.reads)
        case MathReward():
            from rlhf.rewards.equality import MathEquality

            function = MathEquality(section.answer_in, section.seconds)
        case SQLReward():
            from rlhf.rewards.sql import Limits, SQLExecution

            limits = Limits(section.max_steps, section.seconds, section.max_rows)
            databases = files.root / section.databases
            function = SQLExecution(databases, section.answer_in, section.runs, limits, section.max_failing_share)
            check = function.check
        case FunctionReward():
            from rlhf.rewards.own import load_function

            function = load_function(files.root / section.path, section.name)
        case LengthReward() | LengthStepsReward():
            settings = _settings(section, "unit") | {"measure": _measure(section.unit, files.sft)}
            function = _bound(BY_RULE[section.kind], settings)
        case _:
            function = _bound(BY_RULE[section.kind], _settings(section))
    return Reward(name, function, section.weight, check)


def _settings(section: RewardSection, *others: str) -> dict[str, Any]:
    left_out = {"kind", "weight", *others}
    return {name: getattr(section, name) for name in type(section).model_fields if name not in left_out}


def _bound(function: Callable[..., Any], settings: Mapping[str, Any]) -> RewardFunction:
    """The function with its settings, which no column of the same name replaces."""

    def score(prompts: Any, completions: Any, **columns: Any) -> Any:
        return function(prompts, completions, **{**columns, **settings})

    return score


def _measure(unit: str, tokenizer: Path) -> Measure:
    if unit == "characters":
        return len
    encode = load_tokenizer(tokenizer)
    return lambda text: len(encode(text, add_special_tokens=False)["input_ids"])
