"""Gold beside proxy while a policy trains: the best state is kept, and over-optimisation is called by its name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rlhf.checkpoints import random_state, set_random_state
from rlhf.curves import Log
from rlhf.evaluation.comparison import compare, estimate_mean
from rlhf.evaluation.kl import kl_per_answer
from rlhf.evaluation.prompts import (
    GoldFiles,
    HeldOutPrompts,
    describe_answers,
    estimate_gold,
    gold_inputs,
    gold_reward,
    proxy_reward,
    read_prompts,
)
from rlhf.models import adapters_kept, load_causal, load_tokenizer, on_device
from rlhf.params import EvaluateParams, WatchParams
from rlhf.training import Snapshot, evaluation_steps

logger = logging.getLogger(__name__)

ERROR = 0.05
"""The chance, at most, that a policy whose gold reward never fell is said to be over-optimised at one of its looks."""


@dataclass(frozen=True)
class WatchFiles:
    """The SFT model, reward model (None where there is none), what gold reads, and held-out prompts."""

    sft: Path
    reward: Path | None
    gold: GoldFiles
    prompts: Path


@dataclass(frozen=True)
class Look:
    """What was seen after `step` steps: the gold reward of each answer, and all figures."""

    step: int
    gold: list[float]
    figures: dict[str, float]

    @property
    def proxy(self) -> float | None:
        """The mean proxy reward, None without a reward model."""
        return self.figures.get("watch/proxy_reward")

    @property
    def mean_gold(self) -> float:
        return sum(self.gold) / len(self.gold)


class GoldWatch:
    """Measures a policy at even steps on prompts that neither training nor the final evaluation reads.

    All looks share prompts and luck. Over-optimised is a policy whose gold reward lies significantly below that of its
    best state while its proxy reward lies above. Where `on_over_optimisation` is `stop`, the second such look in a row
    ends the training: a policy may recover from a first one. The measured model is left as it was, random numbers
    included. Besides it, one further model at a time is in memory.
    """

    def __init__(self, params: WatchParams, evaluate: EvaluateParams, files: WatchFiles, seed: int, log: Log) -> None:
        """Raises UserError where no prompt is left beyond those of the final evaluation."""
        rows = read_prompts(files.prompts, evaluate.prompts, params.prompts)
        self._params = params
        self._files = files
        self._log = log
        self._prompts = HeldOutPrompts(evaluate, seed, load_tokenizer(files.sft), rows)
        self.key = evaluate.model_dump_json()
        self.inputs = [files.sft, files.prompts, *([files.reward] if files.reward else [])]
        self.inputs += gold_inputs(evaluate, files.gold)
        self._snapshot = Snapshot()
        self._looks: list[Look] = []

    def look(self, model: Any, step: int, total: int | None) -> bool:
        """Measure where a look is due; true where the policy stays over-optimised and training shall end for it."""
        is_due = total is None or step in {0} | evaluation_steps(total, self._params.evaluations)
        if not is_due or any(look.step == step for look in self._looks):
            return False
        with _undisturbed(model):
            look = self._measure(model, step)
        self._looks.append(look)
        self._log(look.figures, step)
        if self._best is look:
            self._snapshot.take(model)
        stays = [bool(one.figures["watch/over_optimised"]) for one in self._looks[-2:]] == [True, True]
        return stays and self._params.on_over_optimisation == "stop"

    @property
    def _best(self) -> Look | None:
        """The look with the highest gold reward, of equally good ones the last."""
        return max(reversed(self._looks), key=lambda look: look.mean_gold, default=None)

    def roll_back(self, model: Any, step: int) -> None:
        """Put the weights of the best look back; of equally good ones the last."""
        if self._best is None:
            return
        self._snapshot.put_back(model)
        self._log({"watch/saved_step": float(self._best.step)}, step)
        logger.info("the policy of step %s is kept, the best of %s looks", self._best.step, len(self._looks))

    def state(self) -> dict[str, Any]:
        """Plain types and tensors from which `restore` goes on."""
        return {"looks": [asdict(look) for look in self._looks], "weights": self._snapshot.weights}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; what had been seen by then is logged again."""
        self._looks = [Look(**look) for look in state["looks"]]
        self._snapshot.weights = state["weights"]
        for look in self._looks:
            self._log(look.figures, look.step)

    def _measure(self, model: Any, step: int) -> Look:
        """The figures of a model; over-optimised means gold fallen and proxy risen since the best look."""
        prompts, temperature = self._prompts, self._prompts.params.temperature
        answers = prompts.answer(model, temperature)
        kl = kl_per_answer(prompts.log_probs(model, answers), self._reference_log_probs(model, answers), "k1")
        gold = prompts.reward(gold_reward(prompts.params, self._files.gold), answers)
        interval = estimate_gold(gold)
        figures = {
            "watch/gold_reward": interval.mean,
            "watch/gold_reward_low": interval.low,
            "watch/gold_reward_high": interval.high,
            "watch/kl_to_sft": estimate_mean(kl).mean,
            **{f"watch/{name}": value for name, value in describe_answers(answers).items()},
        }
        if self._files.reward is not None:
            believed = estimate_mean(prompts.reward(proxy_reward(prompts.params, self._files.reward), answers))
            figures |= {
                "watch/proxy_reward": believed.mean,
                "watch/proxy_reward_low": believed.low,
                "watch/proxy_reward_high": believed.high,
            }
        is_over_optimised = self._is_over_optimised(Look(step, gold, figures))
        return Look(step, gold, {**figures, "watch/over_optimised": float(is_over_optimised)})

    def _is_over_optimised(self, look: Look) -> bool:
        best = self._best
        if best is None or best.proxy is None or look.proxy is None:
            return False
        # The best of some looks owes its place to luck too: all pairs of looks share the error (Bonferroni).
        pairs = self._params.evaluations * (self._params.evaluations + 1) / 2
        quantile = NormalDist().inv_cdf(1 - ERROR / pairs)
        if compare(look.gold, best.gold, quantile).high >= 0.5 or look.proxy <= best.proxy:
            return False
        logger.warning(
            "over-optimisation: from step %s to %s the gold reward fell from %.3f to %.3f while the proxy reward rose "
            "from %.3f to %.3f", best.step, look.step, best.mean_gold, look.mean_gold, best.proxy, look.proxy,
        )  # fmt: skip
        return True

    def _reference_log_probs(self, model: Any, answers: Any) -> Any:
        """Under the SFT model: the base of an adapter, or from the disk for as long as it is needed."""
        if hasattr(model, "disable_adapter"):
            with adapters_kept(model), model.disable_adapter():
                return self._prompts.log_probs(model, answers)
        return self._prompts.log_probs(on_device(load_causal(self._files.sft)), answers)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Measure in evaluation mode; afterwards mode and random numbers are as they were."""
    state, is_training = random_state(), model.training
    model.eval()
    try:
        yield
    finally:
        model.train(is_training)
        set_random_state(state)
