"""The models of PPO and how they read a batch of answers: policy, critic of three kinds, frozen reference."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForTokenClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.examples import captured_inputs
from rlhf.models import (
    adapters_kept,
    fresh_head_expected,
    load_causal,
    lora_config,
    on_device,
    target_modules_named,
    trained_weights,
)
from rlhf.params import AdapterParams, PPOParams, reads_reward_model
from rlhf.policies import PolicyFiles
from rlhf.scoring import tokenizer_difference

logger = logging.getLogger(__name__)

POLICY, CRITIC = "default", "critic"
"""The adapters' names; PEFT calls the first one of a model so."""

STRIDE = 8
"""Padding before prompts goes by so many tokens at a time: few different shapes, which accelerators like aligned."""


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
        """Some rows, cut where the longest of their responses ends and, in whole STRIDEs, where their prompts begin."""
        attention = self.attention[index]
        first = int(attention[:, : self.prompt_length].argmax(1).min().item()) // STRIDE * STRIDE
        last = self.prompt_length + int(self.mask[index].sum(1).max().item())
        return Batch(self.tokens[index, first:last], attention[:, first:last], self.prompt_length - first)

    def split(self, size: int) -> list[Batch]:
        """All rows in order, `size` at a time and as wide as they are."""
        parts = zip(self.tokens.split(size), self.attention.split(size), strict=True)
        return [Batch(tokens, attention, self.prompt_length) for tokens, attention in parts]


class ValueHead(nn.Module):
    """One value per token from the states that the policy's language head reads; zero everywhere at first.

    `adapter` names the policy's adapter under which the states are computed, None for the policy's own states.
    """

    def __init__(self, hidden_size: int, adapter: str | None) -> None:
        super().__init__()
        self.adapter = adapter
        self.linear = nn.Linear(hidden_size, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, states: Tensor) -> Tensor:
        """(batch, tokens, hidden) → (batch, tokens)."""
        return self.linear(states.float()).squeeze(-1)


@dataclass
class Models:
    """Policy, critic (None where advantages need none) and reference (None: the policy with its adapter off)."""

    policy: Any
    critic: Any | None
    reference: Any | None

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        """What is optimised, by name, of the policy and of the critic."""
        policy = trained_weights(self.policy)
        if self.critic is None:
            return {"policy": policy}
        critic = trained_weights(self.critic)
        if self._second_adapter:
            critic |= {name: policy.pop(name) for name in list(policy) if f".{CRITIC}." in name}
        return {"policy": policy, "critic": critic}

    def each(self, prepare: Callable[[Any], None]) -> None:
        """Let something be done to every model there is."""
        for model in (self.policy, self.critic, self.reference):
            if model is not None:
                prepare(model)

    def read(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The policy's logits for each response token (batch, response, vocabulary) and the critic's values."""
        if self.critic is None or not self.one_pass:
            return self.logits(batch), self.values(batch)
        with captured_inputs(self.policy.get_output_embeddings()) as states:
            logits = response_logits(self.policy, batch)
        return logits, self.critic(states[0][:, -logits.shape[1] - 1 : -1])

    def logits(self, batch: Batch) -> Tensor:
        return response_logits(self.policy, batch)

    def values(self, batch: Batch) -> Tensor | None:
        """The values of a critic that has a pass of its own: (batch, response)."""
        if self.critic is None:
            return None
        if self._second_adapter:
            return self._adapter_values(batch, self.critic)
        output = self.critic(**inputs(batch))
        return output.logits[:, batch.prompt_length - 1 : -1, 0].float()

    def reference_logits(self, batch: Batch) -> Tensor:
        if self.reference is not None:
            return response_logits(self.reference, batch)
        with adapters_kept(self.policy), self.policy.disable_adapter():
            return response_logits(self.policy, batch)

    @property
    def one_pass(self) -> bool:
        """Whether policy and critic read the same states, or there is no critic: one pass serves both."""
        return self.critic is None or (isinstance(self.critic, ValueHead) and self.critic.adapter is None)

    @property
    def _second_adapter(self) -> bool:
        return isinstance(self.critic, ValueHead) and self.critic.adapter is not None

    def _adapter_values(self, batch: Batch, head: ValueHead) -> Tensor:
        with adapters_kept(self.policy):
            self.policy.set_adapter(head.adapter)
            causal = self.policy.get_base_model()
            states = getattr(causal, causal.base_model_prefix)(**inputs(batch)).last_hidden_state
            self.policy.set_adapter(POLICY)
        return head(states[:, batch.prompt_length - 1 : -1])


# reading ------------------------------------------------------------------------------------------


def inputs(batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.tokens,
        "attention_mask": batch.attention,
        "position_ids": batch.positions,
        "use_cache": False,
    }


def response_logits(model: Any, batch: Batch) -> Tensor:
    """The logits that predict each response token: (batch, response, vocabulary)."""
    length = batch.tokens.shape[1] - batch.prompt_length
    return model(**inputs(batch), logits_to_keep=length + 1).logits[:, -length - 1 : -1]


# loading ------------------------------------------------------------------------------------------


def load_models(params: PPOParams, files: PolicyFiles) -> Models:
    """The policy from the SFT model, a critic where advantages need one, and the reference.

    Raises UserError where the adapter names modules that the model lacks.
    """
    policy = load_causal(files.sft, params)
    critic = load_critic(params, files, policy) if params.advantage == "gae" else None
    reference = None if params.adapter else load_causal(files.sft).requires_grad_(False)
    if params.adapter:
        policy = with_adapter(policy, params.adapter, "CAUSAL_LM")
        if isinstance(critic, ValueHead):
            if critic.adapter is not None:
                policy.add_adapter(critic.adapter, lora_config(params.adapter, "CAUSAL_LM"))
                for name, value in policy.named_parameters():
                    value.requires_grad_("lora_" in name)
        elif critic is not None:
            critic = with_adapter(critic, params.adapter, "TOKEN_CLS")
    if params.gradient_checkpointing:
        for model in (policy, critic):
            if model is not None and not isinstance(model, ValueHead):
                recompute_layers(model)
    models: list[Any] = [policy, critic, reference]
    return Models(*(model if model is None else on_device(model).eval() for model in models))


def recompute_layers(model: Any) -> None:
    """Keep no activations inside layers for the backward pass; compute them again there.

    Not by transformers' own switch: it waits for the training mode, which would turn dropout on.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **settings: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **settings)
        return checkpoint(partial(forward, **settings), *arguments, use_reentrant=False, preserve_rng_state=False)

    return run


def load_critic(params: PPOParams, files: PolicyFiles, policy: Any) -> Any:
    """A model of its own, from the reward model where it can be; or a head over the policy's transformer."""
    if params.critic == "separate":
        return load_own_critic(critic_start(params, files), policy.dtype)
    hidden_size = policy.get_output_embeddings().weight.shape[1]
    return ValueHead(hidden_size, CRITIC if params.critic == "adapter" else None)


def critic_start(params: PPOParams, files: PolicyFiles) -> Path:
    """The reward model; the SFT model where there is none, or a frozen one of another kind or with other tokens."""
    if not reads_reward_model(params.rewards):
        return files.sft
    config = json.loads((files.reward / "config.json").read_text(encoding="utf-8"))
    reason = "has hidden layers" if "auto_map" in config else tokenizer_difference(files.sft, files.reward)
    if reason:
        logger.info("the critic starts from the SFT model, as the reward model is of another kind: %s", reason)
    return files.sft if reason else files.reward


def load_own_critic(start: Path, dtype: torch.dtype) -> Any:
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
        nn.init.zeros_(parameter)
    return critic


def with_adapter(model: Any, adapter: AdapterParams, task: str) -> Any:
    """The model under a fresh adapter."""
    from peft import get_peft_model

    with target_modules_named(adapter):
        return get_peft_model(model, lora_config(adapter, task))
