"""What prompts must be before a policy may answer them."""

from __future__ import annotations

import sys
from typing import Any

from rlhf.data.formats import Row
from rlhf.encoding import encode_prompt
from rlhf.errors import UserError
from rlhf.params import GroupParams, IterativeDPOParams, PPOParams


def context_length(config: Any) -> int:
    """How many tokens a model reads, by its configuration; no limit where that names none."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def check_prompts(
    rows: list[Row], tokenizer: Any, params: PPOParams | GroupParams | IterativeDPOParams, config: Any
) -> None:
    """Refuse an empty file, and prompts after which the model's context does not hold a whole answer."""
    if not rows:
        raise UserError(
            f"{params.algorithm} has no prompts to answer; raise the limit or lower the gates of prepare.data.prompts"
        )
    context = context_length(config)
    for row in rows:
        length = len(encode_prompt(tokenizer, row["prompt"]))
        if length + params.max_new_tokens > context:
            raise UserError(
                f"prompt {row['id']} is {length} tokens long and max_new_tokens is {params.max_new_tokens}, together "
                f"more than the {context} that the model reads; lower validate.max_prompt_tokens or max_new_tokens"
            )
