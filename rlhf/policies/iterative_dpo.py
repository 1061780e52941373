"""Iterative DPO: in rounds, the policy answers, rewards rank, and DPO learns best against worst of its own answers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from trl import DPOTrainer

from rlhf.checkpoints import Parts
from rlhf.curves import CurveRecorder, Log
from rlhf.data.formats import Row, with_ids, write_rows
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer, on_device, save_model, set_determinism
from rlhf.params import DPOLossParams, DPOParams, IterativeDPOParams, TrainingParams
from rlhf.policies import PolicyFiles, Run
from rlhf.policies.dpo import configuration
from rlhf.policies.pairs import PairMethod, pair_rows, train_on_pairs
from rlhf.policies.prompts import context_length, read_prompts
from rlhf.policies.ranking import best_and_worst, fits_when_read
from rlhf.policies.rollout import prompt_batches, score_answers
from rlhf.policies.sampling import read_answers, sample
from rlhf.rewards.building import build_rewards
from rlhf.scoring import Reward, check_rows
from rlhf.team import shared_folder

logger = logging.getLogger(__name__)


def train_iterative_dpo(params: IterativeDPOParams, files: PolicyFiles, run: Run) -> PreTrainedModel:
    """Rounds of sampling, ranking and DPO; the steps of all rounds are one series. Sources: Xiong et al., arXiv
    2312.11456; Xu et al., 2312.16682; Yuan et al., 2401.10020.

    One that was stopped goes on after its last whole round, and a round is also how often a watch looks.
    Raises UserError where a prompt leaves no room for an answer, a reward fails, or the first round finds no pair.
    """
    tokenizer = load_tokenizer(files.sft)
    rewards = build_rewards(params.rewards, files, params.batch_size)
    state = Rounds(on_device(load_causal(files.sft)))
    prompts = read_prompts(files.prompts, tokenizer, params, state.policy.config, run.ledger)
    check_rows(rewards, prompts)
    curves = CurveRecorder(run.log)
    series = Series(curves)
    parts = Parts(rounds=state, series=series, curves=curves, **run.parts)
    if not run.resume(parts):
        run.look(state.policy, 0, None)
    batches = prompt_batches(prompts, params.prompts_per_round * params.group_size, params.group_size, run.seed)
    for number, rows in islice(enumerate(batches, 1), state.done, params.rounds):
        set_determinism(run.seed + number)
        answers = sample_answers(params, state.policy, tokenizer, rows)
        pairs, figures = rank(params, answers, tokenizer, rewards)
        series({"round": float(number), **figures}, 0)
        if not pairs:
            _refuse_or_warn(number)
            break
        state.policy = learn(params, files, state.policy, pairs, Run(run.seed + number, series, team=run.team))
        state.done = number
        series.close_round()
        if run.look(state.policy, series.steps, None):
            break
        run.offer(number, parts)
    run.roll_back(state.policy, series.steps)
    return state.policy


def learn(params: IterativeDPOParams, files: PolicyFiles, policy: Any, pairs: list[Row], run: Run) -> Any:
    """The policy after a round of DPO; every weight of it can be trained again, adapters being merged."""
    with shared_folder(run.team) as folder:
        start, preferences = folder / "policy", folder / "preferences.jsonl"
        save_model(policy, load_tokenizer(files.sft), start)
        run.team.from_main(lambda: write_rows(preferences, pairs))
        round_files = replace(files, sft=start, preferences=preferences)
        return train_on_pairs(dpo_section(params), round_files, run, _method(params, files.sft)).requires_grad_(True)


@dataclass
class Rounds:
    """What changes from round to round: the policy, and how many rounds are done."""

    policy: Any
    done: int = 0

    def state(self) -> dict[str, Any]:
        return {"weights": dict(self.policy.state_dict()), "done": self.done}

    def restore(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["weights"])
        self.done = state["done"]


class Series:
    """A Log that counts the steps of a round on from those of the rounds before."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._before = 0
        self.steps = 0

    def __call__(self, figures: Mapping[str, float], step: int) -> None:
        self.steps = self._before + step
        self._log(figures, self.steps)

    def close_round(self) -> None:
        self._before = self.steps

    def state(self) -> int:
        return self._before

    def restore(self, state: int) -> None:
        self._before = self.steps = state


# answers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """One answer per row; `usable` where it may stand in a pair; the figures of all of them."""

    rows: list[Row]
    texts: list[Any]
    usable: list[bool]
    figures: dict[str, float]


def sample_answers(params: IterativeDPOParams, policy: Any, tokenizer: Any, rows: list[Row]) -> Answers:
    """The policy's answers, `batch_size` at a time.

    One that was cut off is in no pair, as DPO would end it where it does not end; nor is one that is longer than the
    context when it is read again, which happens to tokens that are no text.
    """
    texts, ended, lengths = [], [], []
    for first in range(0, len(rows), params.batch_size):
        part = rows[first : first + params.batch_size]
        batch, ends = sample(params, policy, tokenizer, part)
        texts += read_answers(part, batch, tokenizer)
        ended += ends.tolist()
        lengths += batch.mask.sum(1).tolist()
    limit = context_length(policy.config)
    usable = [
        end and fits_when_read(tokenizer, row["prompt"], text, limit)
        for row, text, end in zip(rows, texts, ended, strict=True)
    ]
    figures = {
        "completions/mean_length": sum(lengths) / len(rows),
        "completions/stop_rate": sum(ended) / len(rows),
    }
    return Answers(rows, texts, usable, figures)


def rank(
    params: IterativeDPOParams, answers: Answers, tokenizer: Any, rewards: Sequence[Reward]
) -> tuple[list[Row], dict[str, float]]:
    """The best and the worst usable answer to each prompt, and figures; `group_size` rows in a row share a prompt.

    A prompt whose answers are all equally good gives no pair. Of equals the first is taken.
    """
    scores, parts = score_answers(answers.rows, answers.texts, rewards)
    pairs = []
    for first in range(0, len(scores), params.group_size):
        places = [place for place in range(first, first + params.group_size) if answers.usable[place]]
        if pair := best_and_worst(scores, places):
            best, worst = pair
            prompt = answers.rows[first]["prompt"]
            pairs.append({"prompt": prompt, "chosen": answers.texts[best], "rejected": answers.texts[worst]})
    figures = {
        "reward": sum(scores) / len(scores),
        **{f"rewards/{name}/mean": sum(values) / len(values) for name, values in parts.items()},
        "frac_reward_zero_std": 1 - len(pairs) * params.group_size / len(scores),
    }
    return with_ids(pairs), figures | answers.figures


def _refuse_or_warn(number: int) -> None:
    """Nothing to learn in the first round is an error; later the policy so far is the result."""
    finding = f"in round {number} no prompt has two whole answers with different rewards"
    remedy = "take prompts of middling difficulty, raise group_size, temperature or max_new_tokens"
    if number == 1:
        raise UserError(f"{finding}, so that there is no pair to learn from; {remedy}, or add a finer reward")
    logger.warning("%s: the training ends here; %s", finding, remedy)


# rounds -------------------------------------------------------------------------------------------


def dpo_section(params: IterativeDPOParams) -> DPOParams:
    """A round as a training by DPO; no pair is contradicted or too long here."""
    shared = {name: getattr(params, name) for part in (TrainingParams, DPOLossParams) for name in part.model_fields}
    return DPOParams(**shared, algorithm="dpo", contradicted="keep", epochs=params.epochs, max_length=sys.maxsize)


def _method(params: IterativeDPOParams, sft: Path) -> PairMethod:
    """DPO with the reference asked for; train_on_pairs itself takes the model that the round starts from."""
    if params.reference == "previous":
        return PairMethod(DPOTrainer, configuration, pair_rows, has_reference=True)
    return PairMethod(partial(DPOTrainer, ref_model=load_causal(sft)), configuration, pair_rows, has_reference=False)
