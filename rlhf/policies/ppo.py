"""Proximal policy optimisation of a language model: roll out, judge, estimate advantages, update, repeat."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from rlhf.checkpoints import Parts
from rlhf.curves import CurveRecorder
from rlhf.data.formats import Row
from rlhf.models import load_tokenizer, put_back, set_determinism
from rlhf.params import PPOParams
from rlhf.policies import PolicyFiles, Run
from rlhf.policies.actors import Models, load_models
from rlhf.policies.advantages import Adaptive, describe, estimate, settle_scores
from rlhf.policies.prefixes import shared_prefixes
from rlhf.policies.prompts import read_prompts
from rlhf.policies.refills import further_prompts, refilled
from rlhf.policies.rollout import Judged, judge, prompt_batches, roll_out, share_out
from rlhf.policies.sampling import SharedLuck
from rlhf.policies.updates import Optimiser
from rlhf.policies.vllm import VLLMEngine, check_vllm
from rlhf.rewards.building import build_rewards
from rlhf.scoring import check_rows
from rlhf.team import check_share
from rlhf.training import finished_policy


def train_ppo(params: PPOParams, files: PolicyFiles, run: Run) -> PreTrainedModel:
    """Maximise the mixed reward minus β·KL to the SFT model. Source: Schulman et al., arXiv 1707.06347;
    Ouyang et al., arXiv 2203.02155.

    A training that was stopped goes on from its checkpoint, to the same bytes and curves as one that was not.
    Several processes share rollouts and minibatches, and come to what one would but for rounding.
    Raises UserError where a prompt leaves no room for an answer, a reward fails, processes cannot share a minibatch,
    or vLLM is missing.
    """
    check_share("batch_size / minibatches", params.batch_size // params.minibatches)
    check_vllm(params)
    set_determinism(run.seed)
    tokenizer = load_tokenizer(files.sft)
    rewards = build_rewards(params.rewards, files, params.batch_size)
    models = load_models(params, files)
    prompts = read_prompts(files.prompts, tokenizer, params, models.policy.config, run.ledger)
    check_rows(rewards, prompts)
    engine = VLLMEngine(params, params.vllm, models.policy, tokenizer) if params.vllm else None
    training = Training(models, Optimiser(params, models, run.team), Adaptive(params.beta))
    curves = CurveRecorder(run.log)
    parts = Parts(training=training, curves=curves, **run.parts)
    run.resume(parts)

    def answer(rows: list[Row], luck: SharedLuck | None) -> Judged:
        rollout = roll_out(params, models, tokenizer, rows, engine or luck)
        return rollout, *judge(rollout, tokenizer, rewards)

    together = partial(share_out, run.team, params, answer=answer)

    batches = prompt_batches(prompts, params.batch_size, params.group_size, run.seed)
    remaining = islice(enumerate(batches, 1), training.steps, params.steps)
    with shared_prefixes() as share:
        if params.group_size > 1:
            models.each(share)
        run.look(models.policy, training.steps, params.steps)
        for step, rows in tqdm(remaining, desc="ppo", unit="rollout", initial=training.steps, total=params.steps):
            if engine:
                engine.take_weights()
            judged = together(rows)
            if params.dynamic_sampling:
                judged = refilled(params, judged, together, partial(further_prompts, prompts, run.seed, step))
            figures = improve(params, training, judged)
            training.steps = step
            curves(figures, step)
            if run.look(models.policy, step, params.steps):
                break
            run.offer(step, parts)
    run.roll_back(models.policy, training.steps)
    return finished_policy(models.policy, params, files.sft, tokenizer)


def improve(params: PPOParams, training: Training, judged: Judged) -> dict[str, float]:
    """Learn from the answers of a rollout; returns its figures."""
    rollout, raw, figures = judged
    scores = settle_scores(params, raw, rollout.ended, training.adaptive)
    experience = estimate(params, rollout, scores, training.adaptive.beta)
    figures = figures | describe(params, rollout, experience)
    figures |= training.optimiser.update(rollout, experience, training.adaptive.beta)
    return figures | training.adaptive.follow(params, figures["objective/kl"])


@dataclass
class Training:
    """What PPO changes: weights, moments, learning rates, β, score scale; and how many rollouts are done.

    The order of prompts follows from their number and the seed.
    """

    models: Models
    optimiser: Optimiser
    adaptive: Adaptive
    steps: int = 0

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "weights": self.models.trained(),
            "adam": self.optimiser.adam.state_dict(),
            "schedule": self.optimiser.schedule.state_dict(),
            "adaptive": asdict(self.adaptive),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for part, weights in self.models.trained().items():
            put_back(weights, state["weights"][part])
        self.optimiser.adam.load_state_dict(state["adam"])
        self.optimiser.schedule.load_state_dict(state["schedule"])
        self.adaptive = Adaptive(**state["adaptive"])
