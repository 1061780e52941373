"""Log-probabilities of given answers, and the distance of a policy from a reference by one estimator for all."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.policies.objectives import MAX_LOGITS, kl_estimate, token_log_probs

Sequences = Sequence[tuple[list[int], list[int]]]
"""Token ids of prompts and of their completions."""


@torch.inference_mode()
def completion_log_probs(model: Any, sequences: Sequences, temperature: float, batch_size: int) -> list[Tensor]:
    """The log π of each completion's tokens given its prompt: a tensor (tokens,) per sequence, in the order given.

    `temperature` is that of the sampling: log π is that of the distribution tokens were drawn from.
    """
    results: dict[int, Tensor] = {}
    for chosen in _batches(sequences, batch_size, model.config.vocab_size):
        batch = [sequences[index] for index in chosen]
        width = max(len(completion) for _, completion in batch)
        answers = torch.tensor([[*ids, *[0] * (width - len(ids))] for _, ids in batch], device=model.device)
        log_probs = token_log_probs(_completion_logits(model, batch), answers, temperature).cpu()
        for row, index in enumerate(chosen):
            results[index] = log_probs[row, : len(sequences[index][1])].clone()
    return [results[index] for index in range(len(sequences))]


def _batches(sequences: Sequences, batch_size: int, vocabulary: int) -> Iterator[list[int]]:
    """Places of sequences with completions of similar length, as many as MAX_LOGITS allows and one at least."""
    waiting: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: (len(sequences[index][1]), len(sequences[index][0]))):
        logits = (len(waiting) + 1) * (len(sequences[index][1]) + 1) * vocabulary
        if waiting and (len(waiting) == batch_size or logits > MAX_LOGITS):
            yield waiting
            waiting = []
        waiting = [*waiting, index]
    if waiting:
        yield waiting


def _completion_logits(model: Any, batch: Sequences) -> Tensor:
    """The logits that predict each completion token: (batch, longest completion, vocabulary).

    Prompts are padded on the left and completions on the right, so that all completions begin in one column and the
    logits of prompts need not be computed.
    """
    before = max(len(prompt) for prompt, _ in batch)
    behind = max(len(completion) for _, completion in batch)
    rows = [(before - len(prompt), [*prompt, *completion], behind - len(completion)) for prompt, completion in batch]
    tokens = torch.tensor([[0] * left + ids + [0] * right for left, ids, right in rows], device=model.device)
    attention = torch.tensor(
        [[0] * left + [1] * len(ids) + [0] * right for left, ids, right in rows], device=model.device
    )
    inputs = {"input_ids": tokens, "attention_mask": attention, "logits_to_keep": behind + 1}
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's own signature names less
    if "position_ids" in inspect.signature(causal.forward).parameters:
        inputs["position_ids"] = (attention.cumsum(1) - 1).clamp_min(0)
    return model(**inputs, use_cache=False).logits[:, -behind - 1 : -1]


def kl_per_answer(log_probs: Sequence[Tensor], reference: Sequence[Tensor], estimator: str) -> list[float]:
    """One estimate of KL(π ‖ π_ref) in nats per answer that π sampled: its tokens' estimates (tokens,) summed.

    `estimator` is `k1`, `k2` or `k3` (rlhf.policies.objectives.kl_estimate); the mean over answers estimates the
    divergence between the two distributions over whole answers.
    """
    pairs = zip(log_probs, reference, strict=True)
    return [kl_estimate(ours.double(), theirs.double(), estimator).sum().item() for ours, theirs in pairs]


def kl_to_reference(log_probs: Sequence[Tensor], reference: Sequence[Tensor], estimator: str) -> float:
    """The mean of `kl_per_answer`."""
    estimates = kl_per_answer(log_probs, reference, estimator)
    return sum(estimates) / len(estimates)
