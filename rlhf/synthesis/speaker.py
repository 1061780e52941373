"""The model that makes the data: what it is told, how much it can read, what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rlhf.base_models import load_base
from rlhf.encoding import encode_prompt
from rlhf.evaluation.generation import Completion, Decoding, generate
from rlhf.models import on_device, set_determinism
from rlhf.policies.prompts import context_length


class Speaker(Protocol):
    """What answers prompts; `is_chat` where it is told what to do, else it goes on with a text."""

    @property
    def name(self) -> str: ...
    @property
    def is_chat(self) -> bool: ...
    def fits(self, prompt: Any, tokens: int) -> bool:
        """Whether the context holds the prompt and so many tokens behind it."""
        ...

    def say(self, prompts: Sequence[Any], tokens: int, seed: int) -> list[Completion]:
        """One answer of at most so many tokens to each prompt; the same for the same seed and place."""
        ...


@dataclass(frozen=True)
class ModelSpeaker:
    """A language model as a Speaker."""

    name: str
    model: Any
    tokenizer: Any
    decoding: Decoding

    @property
    def is_chat(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @property
    def context(self) -> int:
        return context_length(self.model.config)

    def fits(self, prompt: Any, tokens: int) -> bool:
        return len(encode_prompt(self.tokenizer, prompt)) + tokens <= self.context

    def say(self, prompts: Sequence[Any], tokens: int, seed: int) -> list[Completion]:
        return generate(self.model, self.tokenizer, prompts, replace(self.decoding, max_new_tokens=tokens, seed=seed))


def load_speaker(name: str, temperature: float, batch_size: int, seed: int) -> ModelSpeaker:
    """A folder, a hub id or `package:NAME` as a Speaker. Raises UserError where there is no such model."""
    set_determinism(seed)
    model, tokenizer = load_base(name, Path())
    return ModelSpeaker(name, on_device(model), tokenizer, Decoding(1, temperature, batch_size, seed))
