"""Which prompts a policy answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rlhf.data.formats import Row, training_rows
from rlhf.encoding import read_prompt
from rlhf.errors import UserError
from rlhf.ledger import Ledger, Limit
from rlhf.params import GroupParams, IterativeDPOParams, PPOParams


def context_length(config: Any) -> int:
    """How many tokens a model reads, by its configuration; no limit where that names none."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def read_prompts(
    path: Path,
    tokenizer: Any,
    params: PPOParams | GroupParams | IterativeDPOParams,
    config: Any,
    ledger: Ledger,
) -> list[Row]:
    """The prompts of a file after which the model's context holds a whole answer.

    Raises UserError where there is none, as `Ledger.admit`.
    """
    rows = training_rows(path)
    if not rows:
        raise UserError(
            f"{params.algorithm} has no prompts to answer; raise the limit or lower the gates of prepare.data.prompts"
        )
    context = context_length(config)
    limit = Limit(
        context - params.max_new_tokens,
        f"the model reads {context} tokens and max_new_tokens is {params.max_new_tokens}",
    )
    return ledger.admit_rows("prompts", rows, (read_prompt(tokenizer, row) for row in rows), limit, tokenizer)
