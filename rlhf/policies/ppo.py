"""Proximal policy optimisation of a language model: roll out, score, estimate advantages, clip, repeat."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    GenerationConfig,
    PreTrainedModel,
    get_scheduler,
)

from rlhf.curves import Log
from rlhf.data.formats import Row, render_prompt, training_rows
from rlhf.models import (
    fresh_head_expected,
    load_causal,
    load_tokenizer,
    lora_config,
    own_generation_habits_off,
    set_determinism,
)
from rlhf.params import PPOParams
from rlhf.policies import PolicyFiles
from rlhf.policies.objectives import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    generalised_advantages,
    kl_estimate,
    masked_mean,
    token_log_probs,
    token_rewards,
    whiten,
)
from rlhf.scoring import Reward, build_rewards, mixed_reward, tokenizer_difference
from rlhf.training import finished_policy

logger = logging.getLogger(__name__)


def train_ppo(params: PPOParams, files: PolicyFiles, seed: int, log: Log) -> PreTrainedModel:
    """Maximise the mixed reward minus β·KL to the SFT model. Source: Schulman et al., arXiv 1707.06347;
    Ouyang et al., arXiv 2203.02155.

    Raises UserError where a reward fails.
    """
    set_determinism(seed)
    tokenizer = load_tokenizer(files.sft)
    rewards = build_rewards(params.rewards, files.reward, params.batch_size)
    models = load_models(params, files)
    optimiser = Optimiser(params, models)
    batches = prompt_batches(training_rows(files.prompts), params.batch_size, seed)
    for step in tqdm(range(1, params.steps + 1), desc="ppo", unit="rollout"):
        rollout = roll_out(params, models, tokenizer, next(batches))
        scores, figures = score(params, rollout, tokenizer, rewards)
        experience = estimate(params, rollout, scores)
        figures |= describe(rollout, experience) | optimiser.update(rollout, experience)
        log(figures, step)
    return finished_policy(models.policy, params, files.sft, tokenizer)


# models -------------------------------------------------------------------------------------------


@dataclass
class Models:
    """Policy and critic, and the frozen reference: a model of its own, or the policy with its adapter off."""

    policy: Any
    critic: Any
    reference: Any | None

    def reference_logits(self, batch: Batch) -> Tensor:
        if self.reference is not None:
            return response_logits(self.reference, batch)
        with self.policy.disable_adapter():
            return response_logits(self.policy, batch)


def load_models(params: PPOParams, files: PolicyFiles) -> Models:
    """Policy from the SFT model; critic from the reward model where it can be, with a fresh zero head."""
    policy = load_causal(files.sft, params)
    critic = load_critic(critic_start(params, files), policy.dtype)
    reference = None
    if params.adapter:
        from peft import get_peft_model

        policy = get_peft_model(policy, lora_config(params.adapter, "CAUSAL_LM"))
        critic = get_peft_model(critic, lora_config(params.adapter, "TOKEN_CLS"))
    else:
        reference = load_causal(files.sft).requires_grad_(False)
    if params.gradient_checkpointing:
        for model in (policy, critic):
            model.gradient_checkpointing_enable()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models: list[Any] = [policy, critic, reference]
    return Models(*(model if model is None else model.to(device).eval() for model in models))


def critic_start(params: PPOParams, files: PolicyFiles) -> Path:
    """The reward model; the SFT model where there is none, or a frozen one of another kind or with other tokens."""
    if not params.rewards.reward_model:
        return files.sft
    config = json.loads((files.reward / "config.json").read_text(encoding="utf-8"))
    reason = "has hidden layers" if "auto_map" in config else tokenizer_difference(files.sft, files.reward)
    if reason:
        logger.info("the critic starts from the SFT model, as the reward model is of another kind: %s", reason)
    return files.sft if reason else files.reward


def load_critic(start: Path, dtype: torch.dtype) -> Any:
    """The transformer of a saved model with one value per token, zero everywhere at first."""
    # A critic's dropout would make the values of rollout and update differ by chance.
    config = AutoConfig.from_pretrained(start, num_labels=1)
    config.classifier_dropout = 0.0
    with fresh_head_expected():
        critic = AutoModelForTokenClassification.from_pretrained(
            start, config=config, dtype=dtype, ignore_mismatched_sizes=True
        )
    head = critic.get_submodule("score" if hasattr(critic, "score") else "classifier")
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    return critic


# rollout ------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Prompts padded on the left, responses on the right: `tokens` and `attention` are (batch, prompt + response)."""

    tokens: Tensor
    attention: Tensor
    prompt_length: int

    @property
    def responses(self) -> Tensor:
        return self.tokens[:, self.prompt_length :]

    @property
    def mask(self) -> Tensor:
        """1 on response tokens, the end token included: (batch, response)."""
        return self.attention[:, self.prompt_length :].float()

    @property
    def positions(self) -> Tensor:
        return (self.attention.cumsum(1) - 1).clamp_min(0)

    def rows(self, index: Tensor) -> Batch:
        """Some rows, cut where the longest of their responses ends."""
        longest = self.prompt_length + int(self.mask[index].sum(1).max().item())
        return Batch(self.tokens[index, :longest], self.attention[index, :longest], self.prompt_length)


@dataclass
class Rollout:
    """Sampled answers with what the policy, the reference and the critic thought of each token."""

    rows: list[Row]
    batch: Batch
    ended: Tensor
    log_probs: Tensor
    reference_log_probs: Tensor
    values: Tensor
    entropy: Tensor


def prompt_batches(rows: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Shuffled batches without end; a row comes again only when all others have come."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[index] for index in waiting[:size]]
        waiting = waiting[size:]


@torch.no_grad()
def roll_out(params: PPOParams, models: Models, tokenizer: Any, rows: list[Row]) -> Rollout:
    """Sample one answer per prompt and evaluate its tokens under all models."""
    batch, ended = sample(params, models.policy, tokenizer, rows)
    logits = response_logits(models.policy, batch)
    log_probs = token_log_probs(logits, batch.responses, params.temperature)
    uncertainty = entropy(logits, params.temperature)
    reference_log_probs = token_log_probs(models.reference_logits(batch), batch.responses, params.temperature)
    values = response_values(models.critic, batch)
    return Rollout(rows, batch, ended, log_probs, reference_log_probs, values, uncertainty)


def sample(params: PPOParams, policy: Any, tokenizer: Any, rows: list[Row]) -> tuple[Batch, Tensor]:
    """Answers drawn at `temperature`, and which of them ended by themselves: (batch,) booleans."""
    texts = [render_prompt(tokenizer, row["prompt"]) for row in rows]
    conversational = texts != [row["prompt"] for row in rows]
    encoded = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not conversational
    )
    prompts = {name: encoded[name].to(policy.device) for name in ("input_ids", "attention_mask")}
    # All settings at once: a repetition penalty in the model's own generation_config would bend what is sampled.
    settings = GenerationConfig(
        max_new_tokens=params.max_new_tokens,
        do_sample=True,
        temperature=params.temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with own_generation_habits_off(policy):
        tokens = policy.generate(**prompts, generation_config=settings)
    length = prompts["input_ids"].shape[1]
    ends = tokens[:, length:] == tokenizer.eos_token_id
    # A response reaches up to and including its first end token, whatever pads behind it.
    mask = (ends.cumsum(1) - ends.long()) == 0
    attention = torch.cat([prompts["attention_mask"], mask.long()], 1)
    return Batch(tokens, attention, length), ends.any(1)


def response_logits(model: Any, batch: Batch) -> Tensor:
    """The logits that predict each response token: (batch, response, vocabulary)."""
    length = batch.tokens.shape[1] - batch.prompt_length
    output = model(
        input_ids=batch.tokens,
        attention_mask=batch.attention,
        position_ids=batch.positions,
        logits_to_keep=length + 1,
        use_cache=False,
    )
    return output.logits[:, -length - 1 : -1]


def response_values(critic: Any, batch: Batch) -> Tensor:
    """The critic's value of the state before each response token: (batch, response)."""
    output = critic(
        input_ids=batch.tokens, attention_mask=batch.attention, position_ids=batch.positions, use_cache=False
    )
    return output.logits[:, batch.prompt_length - 1 : -1, 0].float()


# rewards and advantages ---------------------------------------------------------------------------


@dataclass
class Experience:
    """Advantages and returns per response token, `kl` per token, `scores` per answer."""

    advantages: Tensor
    returns: Tensor
    kl: Tensor
    scores: Tensor


def score(
    params: PPOParams, rollout: Rollout, tokenizer: Any, rewards: Sequence[Reward]
) -> tuple[Tensor, dict[str, float]]:
    """The weighted reward of each answer, clipped, an unended answer penalised; and each reward's mean."""
    texts = tokenizer.batch_decode(
        [tokens[mask.bool()] for tokens, mask in zip(rollout.batch.responses, rollout.batch.mask, strict=True)],
        skip_special_tokens=True,
    )
    prompts = [row["prompt"] for row in rollout.rows]
    columns = {name: [row.get(name) for row in rollout.rows] for name in rollout.rows[0] if name != "prompt"}
    total, parts = mixed_reward(rewards, prompts, texts, columns)
    scores = torch.tensor(total, device=rollout.values.device)
    figures = {f"rewards/{name}": sum(values) / len(values) for name, values in parts.items()}
    if params.score_clip is not None:
        scores = scores.clamp(-params.score_clip, params.score_clip)
    return scores - params.missing_eos_penalty * (~rollout.ended).float(), figures


def estimate(params: PPOParams, rollout: Rollout, scores: Tensor) -> Experience:
    """Rewards with the KL leash, generalised advantages, and the returns the critic learns."""
    mask = rollout.batch.mask
    kl = kl_estimate(rollout.log_probs, rollout.reference_log_probs, params.kl_estimator)
    rewards = token_rewards(scores, kl, mask, params.beta)
    advantages = generalised_advantages(rewards, rollout.values, mask, params.gamma, params.gae_lambda)
    returns = advantages + rollout.values * mask
    if params.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(advantages, returns, kl, scores)


def describe(rollout: Rollout, experience: Experience) -> dict[str, float]:
    """The rollout's figures, under TRL's names where it has one."""
    mask = rollout.batch.mask
    difference = rollout.log_probs - rollout.reference_log_probs
    error = masked_mean((experience.returns - rollout.values).square(), mask)
    centred = experience.returns - masked_mean(experience.returns, mask)
    return {
        "objective/scores": experience.scores.mean().item(),
        "objective/kl": (difference * mask).sum(1).mean().item(),
        "objective/entropy": masked_mean(rollout.entropy, mask).item(),
        "critic/explained_variance": 1 - (error / masked_mean(centred.square(), mask).clamp_min(1e-8)).item(),
        "completions/mean_length": mask.sum(1).mean().item(),
        "completions/stop_rate": rollout.ended.float().mean().item(),
    }


# optimisation -------------------------------------------------------------------------------------


class Optimiser:
    """Several epochs of minibatches over one rollout, policy and critic each with its own learning rate."""

    def __init__(self, params: PPOParams, models: Models) -> None:
        self.params = params
        self.models = models
        self.trained = [[p for p in model.parameters() if p.requires_grad] for model in (models.policy, models.critic)]
        rates = (params.learning_rate, params.critic_learning_rate)
        self.adam = torch.optim.AdamW(
            [{"params": group, "lr": rate} for group, rate in zip(self.trained, rates, strict=True)],
            weight_decay=params.weight_decay,
            eps=1e-8,
        )
        updates = params.steps * params.update_epochs * params.minibatches
        warmup = round(params.warmup_share * updates)
        self.schedule = get_scheduler(params.lr_scheduler, self.adam, warmup, updates)

    def update(self, rollout: Rollout, experience: Experience) -> dict[str, float]:
        """Take all gradient steps of one rollout; returns the mean of each figure over them."""
        history: list[dict[str, float]] = []
        size = len(rollout.rows) // self.params.minibatches
        for _ in range(self.params.update_epochs):
            for index in torch.randperm(len(rollout.rows)).to(rollout.values.device).split(size):
                history.append(self._step(rollout, experience, index))
        return {name: sum(figures[name] for figures in history) / len(history) for name in history[0]}

    def _step(self, rollout: Rollout, experience: Experience, index: Tensor) -> dict[str, float]:
        """One gradient step on one minibatch, in `gradient_accumulation_steps` parts."""
        tokens = rollout.batch.mask[index].sum()
        figures: dict[str, float] = {}
        for part in index.chunk(self.params.gradient_accumulation_steps):
            # Parts weigh by their tokens, so that any number of them gives the minibatch's own gradient.
            share = rollout.batch.mask[part].sum() / tokens
            loss, part_figures = self._loss(rollout, experience, part)
            (loss * share).backward()
            for name, value in part_figures.items():
                figures[name] = figures.get(name, 0.0) + value * share.item()
        for name, group in zip(("policy", "critic"), self.trained, strict=True):
            figures[f"{name}/grad_norm"] = torch.nn.utils.clip_grad_norm_(group, self.params.max_grad_norm).item()
        self.adam.step()
        self.schedule.step()
        self.adam.zero_grad()
        return figures

    def _loss(self, rollout: Rollout, experience: Experience, part: Tensor) -> tuple[Tensor, dict[str, float]]:
        params = self.params
        batch = rollout.batch.rows(part)
        mask, width = batch.mask, batch.mask.shape[1]
        old_log_probs, old_values = rollout.log_probs[part, :width], rollout.values[part, :width]
        advantages, returns = experience.advantages[part, :width], experience.returns[part, :width]

        logits = response_logits(self.models.policy, batch)
        log_probs = token_log_probs(logits, batch.responses, params.temperature)
        policy_loss = clipped_policy_loss(log_probs, old_log_probs, advantages, mask, params.clip_range)
        values = response_values(self.models.critic, batch)
        value_loss = clipped_value_loss(values, old_values, returns, mask, params.value_clip_range)
        loss = policy_loss + params.value_coefficient * value_loss
        if params.entropy_coefficient:
            loss = loss - params.entropy_coefficient * masked_mean(entropy(logits, params.temperature), mask)

        with torch.no_grad():
            log_ratio = (log_probs - old_log_probs) * mask
            clipped = (log_ratio.exp() - 1).abs() > params.clip_range
            figures = {
                "loss/policy_avg": policy_loss.item(),
                "loss/value_avg": value_loss.item(),
                "policy/approxkl_avg": 0.5 * masked_mean(log_ratio.square(), mask).item(),
                "policy/clipfrac_avg": masked_mean(clipped.float(), mask).item(),
            }
        return loss, figures
