"""All policies measured alike: the same held-out prompts, the same luck, the same rewards and estimators."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.audit import FLIPPED
from rlhf.data.formats import Row, read_rows
from rlhf.encoding import encode_answer, encode_prompt
from rlhf.evaluation.comparison import Estimate, compare
from rlhf.evaluation.generation import Completion
from rlhf.evaluation.kl import completion_log_probs, kl_per_answer
from rlhf.evaluation.prompts import (
    GoldFiles,
    HeldOutPrompts,
    describe_answers,
    estimate_gold,
    gold_reward,
    proxy_reward,
    read_prompts,
)
from rlhf.models import load_causal, load_tokenizer, on_device, set_determinism
from rlhf.params import EvaluateParams
from rlhf.scoring import Reward, check_rows, check_same_tokenizer

logger = logging.getLogger(__name__)

SFT = "sft"
ESTIMATORS = ("k1", "k3")
"""`kl_to_sft` is by the first, the second stands beside it as a check; docs/evaluation.md says why."""
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class EvaluationFiles:
    """What is measured and with what: model folders by name (`sft` first), reward model, gold, held-out rows."""

    policies: dict[str, Path]
    reward: Path | None
    gold: GoldFiles
    prompts: Path
    preferences: Path


@dataclass
class Measured:
    """One policy's figures, its sampled answers with both rewards and the KL in nats of each, and the mean gold."""

    metrics: dict[str, float | str | None]
    answers: list[Completion]
    gold: list[float]
    proxy: list[float] | None
    kl: list[float]
    interval: Estimate


@dataclass(frozen=True)
class Yardstick(HeldOutPrompts):
    """What stays the same for all policies; `pair_log_probs` are the SFT model's of the preference rows, by side."""

    reference: Any
    gold: Reward
    proxy: Reward | None
    pairs: list[Row]
    pair_log_probs: dict[str, list[float]]


def evaluate_policies(
    params: EvaluateParams, files: EvaluationFiles, seed: int
) -> tuple[Yardstick, dict[str, Measured]]:
    """Measure the SFT model and every policy; the SFT model's answers are everyone's rival.

    Raises UserError where no prompt is held out, one lacks what the gold reward reads, or a policy's tokenizer
    differs from the SFT model's.
    """
    set_determinism(seed)
    for folder in files.policies.values():  # a reward model reads words, in its own tokens
        check_same_tokenizer(files.policies[SFT], folder)
    yardstick = _lay_out(params, files, seed)
    measured: dict[str, Measured] = {}
    for name, folder in files.policies.items():
        logger.info("measuring %s", name)
        model = yardstick.reference if name == SFT else on_device(load_causal(folder))
        measured[name] = _measure(yardstick, model, measured.get(SFT))
    return yardstick, measured


def _lay_out(params: EvaluateParams, files: EvaluationFiles, seed: int) -> Yardstick:
    rows = read_prompts(files.prompts, 0, params.prompts)
    tokenizer, reference = load_tokenizer(files.policies[SFT]), on_device(load_causal(files.policies[SFT]))
    gold = gold_reward(params, files.gold)
    check_rows([gold], rows)
    # As many pairs as prompts: a file of preferences may be much longer, and each pair is read four times.
    pairs = read_rows(files.preferences)[: params.prompts]
    return Yardstick(
        params=params,
        seed=seed,
        tokenizer=tokenizer,
        reference=reference,
        rows=rows,
        gold=gold,
        proxy=proxy_reward(params, files.reward) if files.reward else None,
        pairs=pairs,
        pair_log_probs=_pair_log_probs(reference, tokenizer, pairs, params.batch_size),
    )


def _measure(yardstick: Yardstick, model: Any, rival: Measured | None) -> Measured:
    """Sampled and greedy answers, both rewards, win rate, distance from the SFT model, length, endings."""
    params = yardstick.params
    answers = yardstick.answer(model, params.temperature)
    gold = yardstick.reward(yardstick.gold, answers)
    proxy = yardstick.reward(yardstick.proxy, answers) if yardstick.proxy else None
    theirs = yardstick.log_probs(yardstick.reference, answers)
    ours = theirs if model is yardstick.reference else yardstick.log_probs(model, answers)
    kl = {estimator: kl_per_answer(ours, theirs, estimator) for estimator in ESTIMATORS}
    wins = compare(gold, rival.gold if rival else gold)
    interval = estimate_gold(gold)
    metrics: dict[str, float | str | None] = {
        "gold_reward": interval.mean,
        "gold_reward_low": interval.low,
        "gold_reward_high": interval.high,
        "gold_reward_greedy": _mean(yardstick.reward(yardstick.gold, yardstick.answer(model, 0.0))),
        "proxy_reward": _mean(proxy) if proxy else None,
        "win_rate": wins.mean,
        "win_rate_low": wins.low,
        "win_rate_high": wins.high,
        "kl_to_sft": _mean(kl[ESTIMATORS[0]]),
        "kl_estimator": ESTIMATORS[0],
        f"kl_to_sft_{ESTIMATORS[1]}": _mean(kl[ESTIMATORS[1]]),
        **describe_answers(answers),
        "prompts": len(answers),
        **_measure_preferences(yardstick, model),
    }
    return Measured(metrics, answers, gold, proxy, kl[ESTIMATORS[0]], interval)


def _measure_preferences(yardstick: Yardstick, model: Any) -> dict[str, float]:
    """How the policy moved on held-out pairs since the SFT model: the signs of overfitting to preferences.

    With d = log π − log π_sft of a whole answer in nats: how often d(chosen) > d(rejected) (DPO's implicit accuracy;
    `_clean` by the true labels where all are known), the mean of their difference, and the mean d of each side.
    """
    if not yardstick.pairs:
        return {}
    ours = yardstick.pair_log_probs
    if model is not yardstick.reference:
        ours = _pair_log_probs(model, yardstick.tokenizer, yardstick.pairs, yardstick.params.batch_size)
    drift = {side: _subtract(ours[side], yardstick.pair_log_probs[side]) for side in SIDES}
    margins = _subtract(drift["chosen"], drift["rejected"])
    figures = {
        "preference_accuracy": _accuracy(margins),
        "preference_margin": _mean(margins),
        **{f"{side}_log_prob_drift": _mean(drift[side]) for side in SIDES},
    }
    if all(FLIPPED in row for row in yardstick.pairs):
        signs = [-1 if row[FLIPPED] else 1 for row in yardstick.pairs]
        figures["preference_accuracy_clean"] = _accuracy([a * b for a, b in zip(margins, signs, strict=True)])
    return figures


def _pair_log_probs(model: Any, tokenizer: Any, pairs: Sequence[Row], batch_size: int) -> dict[str, list[float]]:
    """The log-probability in nats of each whole answer, end token included, by side."""
    sums = {}
    for side in SIDES:
        sequences = [_split(tokenizer, row["prompt"], row[side]) for row in pairs]
        sums[side] = [values.sum().item() for values in completion_log_probs(model, sequences, 1.0, batch_size)]
    return sums


def _split(tokenizer: Any, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
    """The ids of prompt and answer; a token in which the two merge belongs to the answer."""
    whole, begin = encode_answer(tokenizer, prompt, answer), encode_prompt(tokenizer, prompt)
    same = 0
    while same < min(len(begin), len(whole)) and begin[same] == whole[same]:
        same += 1
    return whole[:same], whole[same:]


def _subtract(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def _accuracy(margins: Sequence[float]) -> float:
    return _mean([(margin > 0) + 0.5 * (margin == 0) for margin in margins])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
