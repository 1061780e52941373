"""Health rules: what the curves of a training so far say: OK, WARN or STOP by each rule, with reason and remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.curves import write_json

Rows = Mapping[int, Mapping[str, float]]
"""Figures by step, as CurveRecorder keeps them."""
Series = list[float]
Health = dict[str, Any]

VERDICTS = ("ok", "warn", "stop")
"""From sound to broken; a verdict's place is its number in the metrics."""
WINDOW = 0.1
"""The share of a curve's points whose mean is its start, and its end."""
BROKEN = "every curve"
"""Stands for a curve of our own: how many of a step's figures are not finite numbers."""
_LEAST = 1e-8
"""Stands for 0 in a denominator."""
_LEAST_REWARD = 1e-4
"""The same for a start: whitened scores have a mean of 0 but for rounding."""


# measures -----------------------------------------------------------------------------------------


def start(curve: Series) -> float:
    """The mean of the first tenth of the points."""
    return _mean(curve[: _window(curve)])


def end(curve: Series) -> float:
    """The mean of the last tenth of the points."""
    return _mean(curve[-_window(curve) :])


def noise(curve: Series) -> float:
    """The standard deviation of points about a locally straight line, from second differences; 0 below three points.

    A steady rise or fall is no noise. Source: Gasser, Sroka and Jennen-Steinmetz 1986, evenly spaced points.
    """
    bends = [left - 2 * middle + right for left, middle, right in zip(curve, curve[1:], curve[2:], strict=False)]
    return math.sqrt(_mean([bend**2 for bend in bends]) / 6) if bends else 0.0


def _window(curve: Series) -> int:
    return max(1, round(WINDOW * len(curve)))


def _mean(values: Series) -> float:
    return sum(values) / len(values)


def _level(curve: Series) -> float:
    return end(curve)


def _ratio(curve: Series) -> float:
    return end(curve) / max(start(curve), _LEAST)


def _change(curve: Series) -> float:
    return end(curve) - start(curve)


def _gain(curve: Series) -> float:
    """The change as a share of the start; a start within ten times the noise counts as that much."""
    return _change(curve) / max(abs(start(curve)), 10 * noise(curve), _LEAST_REWARD)


def _per_token(kl: Series, length: Series | None = None) -> float:
    return end(kl) / (max(end(length), 1.0) if length else 1.0)


def _over_best(curve: Series) -> float:
    return curve[-1] / max(min(curve), _LEAST) - 1


# rules --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One symptom: a measure of curves, thresholds for it, and what to think and do beyond them."""

    name: str
    curves: Mapping[str, tuple[str, ...]]
    """By algorithm (or stage), the curves that `measure` takes."""
    measure: Callable[..., float]
    figure: str
    """What `measure` returns, in words."""
    side: Literal["above", "below"]
    warn: float
    stop: float | None
    points: int
    """How many points the curves need before the rule speaks."""
    meaning: str
    remedy: str

    def verdict(self, value: float) -> str:
        sign = 1 if self.side == "above" else -1
        if self.stop is not None and sign * value > sign * self.stop:
            return "stop"
        return "warn" if sign * value > sign * self.warn else "ok"


_EVERY = ("ppo", "grpo", "dpo", "iterative_dpo", "sft", "reward")
_GRADIENTS = {"ppo": ("policy/grad_norm",)} | {name: ("grad_norm",) for name in _EVERY if name != "ppo"}
_REWARD = {"ppo": ("objective/scores",), "grpo": ("reward",), "iterative_dpo": ("reward",)}
_ONLINE = ("ppo", "grpo", "iterative_dpo")
_LENGTH: dict[str, tuple[str, ...]] = dict.fromkeys(_ONLINE, ("completions/mean_length",))

RULES = (
    Rule(
        "figures that are no numbers", dict.fromkeys(_EVERY, (BROKEN,)), sum,
        "count of figures that are infinite or not a number", "above", 0, 1, 1,
        "A loss, a gradient or a reward has overflowed, and what is learnt from it is noise.",
        "Lower the learning rate, keep max_grad_norm at 1, train in fp32, and look at the last rows before it.",
    ),
    Rule(
        "no gradient", _GRADIENTS, _level, "gradient norm at the end", "below", 1e-4, 1e-7, 1,
        "Nothing is learnt. A loss of 0 alone is normal in GRPO's first step, and one near 0 ever after, as the "
        "advantages of a group add up to 0; a gradient of 0 is not.",
        "See whether all rewards are equal, and whether the rows leave anything to learn.",
    ),
    Rule(
        "gradient blow-up", _GRADIENTS, _ratio, "gradient norm at the end ÷ at the start", "above", 5, 50, 4,
        "The steps of the optimiser grow instead of shrinking: the training is about to diverge.",
        "Lower the learning rate, or lengthen its warm-up.",
    ),
    Rule(
        "entropy collapse", {"ppo": ("objective/entropy",), "grpo": ("entropy",)}, _ratio,
        "entropy at the end ÷ at the start", "below", 0.25, 0.05, 4,
        "The policy says the same again and again, so that there is little left to explore and to compare.",
        "Raise beta, or with PPO entropy_coefficient or clip_range_high; or train for fewer steps.",
    ),
    Rule(
        "KL blow-up", {"ppo": ("objective/kl", "completions/mean_length"), "grpo": ("kl",)}, _per_token,
        "KL to the SFT model at the end, nats per token", "above", 0.25, 1, 1,
        "The policy has left the SFT model far behind; what the reward does not check is probably lost.",
        "Raise beta (PPO: give adaptive_beta a target), or lower the learning rate.",
    ),
    Rule(
        "negative KL", {"ppo": ("objective/kl", "completions/mean_length")}, _per_token,
        "KL to the SFT model at the end, nats per token", "below", -0.02, -0.1, 4,
        "A true KL is never negative: answers are not drawn from the policy as it is scored, or the policy exploits "
        "the estimator.",
        "Sample without top-k and penalties, at one temperature; take kl_estimator k3 or full.",
    ),
    Rule(
        "steps too large", {"ppo": ("policy/approxkl_avg",)}, _level,
        "KL between the policy before and after an update, nats per token", "above", 0.05, 0.5, 1,
        "One update moves the policy further than its old answers can vouch for.",
        "Lower the learning rate or update_epochs, or set target_kl.",
    ),
    Rule(
        "clipping too often", {"ppo": ("policy/clipfrac_avg",), "grpo": ("clip_ratio/region_mean",)}, _level,
        "share of clipped tokens at the end", "above", 0.2, 0.5, 1,
        "Most of an update is thrown away by the clip, as the policy moves too far on one batch.",
        "Lower the learning rate or update_epochs.",
    ),
    Rule(
        "groups all equal", dict.fromkeys(_ONLINE, ("frac_reward_zero_std",)), _level,
        "share of groups with equal rewards at the end", "above", 0.5, 0.95, 1,
        "Answers to one prompt that all get the same reward teach nothing: the prompts are too easy, too hard, or the "
        "policy has collapsed.",
        "Take prompts of middling difficulty, raise group_size or temperature, or add a finer reward.",
    ),
    Rule(
        "most groups dropped", dict.fromkeys(("ppo", "grpo"), ("groups/dropped",)), _level,
        "share of sampled answers that dynamic sampling drops at the end", "above", 0.7, None, 1,
        "Most sampling is for nothing, and what is learnt from is a small, odd part of the prompts.",
        "Take prompts of middling difficulty, raise group_size, or add a finer reward.",
    ),
    Rule(
        "reward falls", _REWARD, _gain, "change of the reward, as a share of its start", "below", -0.1, -0.5, 4,
        "The training makes worse what it maximises.",
        "Lower the learning rate; see whether the KL, the length or the stop rate broke first.",
    ),
    Rule(
        "over-optimisation", dict.fromkeys((*_ONLINE, "dpo"), ("watch/over_optimised",)), sum,
        "looks at which gold had fallen significantly while the proxy had risen", "above", 0, None, 2,
        "The reward model likes the answers more and more while they get worse: its errors are being learnt. The state "
        "with the highest gold reward was kept.",
        "Raise beta, train for fewer steps, or mend the reward model (alignflow audit).",
    ),
    Rule(
        "answers cut off", {"grpo": ("completions/clipped_ratio",)}, _level,
        "share of answers that reach max_new_tokens at the end", "above", 0.1, 0.5, 1,
        "Answers run to the limit and are judged without their end.",
        "Raise max_new_tokens, or reward a shorter form (rewards.length, rewards.format).",
    ),
    Rule(
        "answers do not end", dict.fromkeys(("ppo", "iterative_dpo"), ("completions/stop_rate",)), _level,
        "share of answers that end by themselves at the end", "below", 0.9, 0.5, 1,
        "Answers run to the limit and are judged without their end.",
        "Raise max_new_tokens, or with PPO missing_eos_penalty.",
    ),
    Rule(
        "stop rate falls", dict.fromkeys(("ppo", "iterative_dpo"), ("completions/stop_rate",)), _change,
        "change of the stop rate", "below", -0.05, -0.3, 4,
        "The policy forgets how to end an answer, mostly as longer ones are rewarded.",
        "Add rewards.length, or with PPO raise missing_eos_penalty.",
    ),
    Rule(
        "answers grow", _LENGTH, _ratio, "mean length at the end ÷ at the start", "above", 1.5, None, 4,
        "Length is being rewarded; that may be reasoning, or a reward model that takes long for good.",
        "Read samples; where they ramble, add rewards.length or train the reward model on data without length bias.",
    ),
    Rule(
        "answers shrink", _LENGTH, _ratio, "mean length at the end ÷ at the start", "below", 0.5, 0.1, 4,
        "Answers lose their content, mostly as short ones are safer from penalties.",
        "Read samples; lower missing_eos_penalty or beta, or add rewards.length.",
    ),
    Rule(
        "critic learns nothing", {"ppo": ("critic/explained_variance",)}, _level,
        "share of the returns' variance that the critic explains at the end", "below", 0, -1, 10,
        "The critic predicts worse than a constant would, so that advantages are noisier than without it.",
        "Raise critic_learning_rate, or take an advantage without a critic (leave_one_out, group).",
    ),
    Rule(
        "chosen answers become less likely", dict.fromkeys(("dpo", "iterative_dpo"), ("logps/chosen",)), _gain,
        "change of the chosen answers' log-probability, as a share of its start", "below", -0.2, -1, 4,
        "The margin grows by pushing both answers down; the probability goes to answers that nobody has compared.",
        "Raise sft_weight or beta, or lower the learning rate.",
    ),
    Rule(
        "preferences learnt by heart", {"dpo": ("rewards/accuracies",)}, _level,
        "share of training pairs that the policy ranks as labelled at the end", "above", 0.97, None, 1,
        "Where labels are noisy, so many agree only if the wrong ones are learnt too.",
        "Compare with preference_accuracy on held-out pairs; train for fewer epochs, or raise label_smoothing.",
    ),
    Rule(
        "margin too large", dict.fromkeys(("dpo", "iterative_dpo"), ("rewards/margins",)), _level,
        "β × margin between chosen and rejected at the end, nats", "above", 5, 20, 1,
        "The preference loss is nearly 0 beyond a margin of 5; what still widens it is overfitting.",
        "Raise beta, train for fewer epochs, or take loss ipo, which aims at a finite margin.",
    ),
    Rule(
        "held-out loss rises", dict.fromkeys(("sft", "reward"), ("held_out_loss",)), _over_best,
        "held-out loss at the end above its lowest, as a share", "above", 0.1, 1, 2,
        "The model learns its training rows by heart. The stage sft goes back to the best step by itself; a reward "
        "model that trims wrong labels is judged on noisy ones here.",
        "Train for fewer epochs or raise weight_decay; for the reward model trust accuracy_clean where there is one.",
    ),
    Rule(
        "reward model guesses", {"reward": ("held_out_accuracy",)}, _level, "held-out accuracy at the end", "below",
        0.55, 0.5, 1,
        "The reward model ranks held-out pairs no better than a coin, so that policies would maximise noise.",
        "Look at the data (alignflow audit), the learning rate and the number of pairs.",
    ),
)  # fmt: skip


RELATIVES = {"rloo": "grpo", "kto": "dpo", "orpo": "dpo", "cpo": "dpo"}
"""Algorithms that are judged as another one is, as TRL calls their curves alike."""


# verdicts -----------------------------------------------------------------------------------------


def judge_curves(algorithm: str, rows: Rows) -> Health:
    """What every rule says of the curves so far; reads nothing else, so it can be asked while a training runs.

    `algorithm` is that of a policy, or `sft` or `reward`. Returns the worst verdict, what each rule found and the
    names of those that lack points or a curve.
    """
    relative = RELATIVES.get(algorithm, algorithm)
    own = [rule for rule in RULES if relative in rule.curves]
    findings = [found for rule in own if (found := _apply(rule, relative, rows))]
    heard = {found["rule"] for found in findings}
    return {
        "algorithm": algorithm,
        "verdict": max((found["verdict"] for found in findings), key=VERDICTS.index, default="ok"),
        "findings": sorted(findings, key=lambda found: -VERDICTS.index(found["verdict"])),
        "silent": [rule.name for rule in own if rule.name not in heard],
    }


def write_health(folder: Path, algorithm: str, rows: Rows) -> int:
    """Write health.json into a stage's report; returns the verdict as a number: 0 is ok, 1 warn, 2 stop."""
    health = judge_curves(algorithm, rows)
    write_json(folder / "health.json", health)
    return VERDICTS.index(health["verdict"])


def _apply(rule: Rule, algorithm: str, rows: Rows) -> dict[str, Any] | None:
    """The rule's finding, or None where it cannot say anything yet."""
    names = rule.curves[algorithm]
    curves = [_curve(rows, name) for name in names]
    if min(len(curve) for curve in curves) < rule.points:
        return None
    value = rule.measure(*curves)
    verdict = rule.verdict(value)
    return {
        "rule": rule.name,
        "verdict": verdict,
        "curves": list(names),
        "value": value,
        "finding": f"{rule.figure}: {value:.3g} ({_limits(rule)})",
        **({} if verdict == "ok" else {"meaning": rule.meaning, "remedy": rule.remedy}),
    }


def _limits(rule: Rule) -> str:
    stop = "" if rule.stop is None else f", stop {rule.side} {rule.stop:g}"
    return f"warn {rule.side} {rule.warn:g}{stop}"


def _curve(rows: Rows, name: str) -> Series:
    """The finite points of a curve in the order of steps."""
    ordered = [rows[step] for step in sorted(rows)]
    if name == BROKEN:
        return [float(sum(not math.isfinite(value) for value in row.values())) for row in ordered]
    return [float(row[name]) for row in ordered if name in row and math.isfinite(row[name])]
