"""Answers from vLLM, by TRL's way to it: the policy's weights are handed over whenever they have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.errors import UserError
from rlhf.params import OnlineParams, PPOParams, VLLMParams
from rlhf.team import process_count


class VLLMEngine:
    """vLLM beside a policy of PPO, whose answers it samples. Every process of a training has one of its own.

    Raises UserError where the package is missing.
    """

    def __init__(self, params: PPOParams, settings: VLLMParams, policy: Any, tokenizer: Any) -> None:
        from accelerate import Accelerator
        from trl.generation.vllm_generation import VLLMGeneration

        self._group_size = params.group_size
        self._generation = VLLMGeneration(
            policy,
            Accelerator(cpu=not torch.cuda.is_available()),
            tokenizer,
            **settings.model_dump(),
            model_impl="vllm",
            max_num_seqs=params.batch_size,
            temperature=params.temperature,
            max_completion_length=params.max_new_tokens,
        )

    def take_weights(self) -> None:
        """Answer with the policy's weights as they are now."""
        self._generation.sync_weights()

    def answer(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """The tokens of an answer to each prompt, the end token included; prompts come in groups."""
        with torch.no_grad():
            _, answers, _, _ = self._generation.generate(list(prompts), None, self._group_size)
        return answers


def check_vllm(params: OnlineParams) -> None:
    """Raise UserError where vLLM is asked for and cannot serve."""
    from trl.import_utils import is_vllm_available

    if params.vllm is None:
        return
    if not is_vllm_available():
        raise UserError(
            "a policy's vllm is set but the package vllm is not installed; install it where there is a CUDA device "
            "with: pip install 'trl[vllm]', or set vllm to null, and transformers samples"
        )
    if isinstance(params, PPOParams) and params.vllm.mode == "server" and process_count() > 1:
        raise UserError(
            f"vllm.mode is 'server' but {process_count()} processes would share it, which only grpo and rloo can; "
            "set it to colocate, or launch one process"
        )


def trl_settings(params: OnlineParams) -> dict[str, Any]:
    """The same for TRL's configurations; nothing where transformers samples."""
    if params.vllm is None:
        return {}
    return {"use_vllm": True, **{f"vllm_{name}": value for name, value in params.vllm.model_dump().items()}}
