"""The canonical rows: how they are read, written, named and turned into text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

Row = dict[str, Any]
SPLITS = ("train", "test")
_BOX = r"\boxed{"
TRUTH = "truth_"
"""Columns with this prefix are known only because the data was made or judged by experts: evaluation may read them."""


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSON-lines file that alignflow wrote."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def training_rows(path: Path) -> list[Row]:
    """The rows as training may see them: without the truth columns."""
    return [without_truth(row) for row in read_rows(path)]


def without_truth(row: Row) -> Row:
    return {key: value for key, value in row.items() if not key.startswith(TRUTH)}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, keys in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(map(row_line, rows))


def row_line(row: Row) -> str:
    """The row as a line of JSON, keys in the order given."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def row_id(row: Row) -> str:
    """Sixteen hex digits of the hash of what the row says, truth columns and any id left out."""
    content = {key: value for key, value in without_truth(row).items() if key != "id"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def with_id(row: Row) -> Row:
    """The row with its `id` first."""
    return {"id": row_id(row), **{key: value for key, value in row.items() if key != "id"}}


def with_ids(rows: Iterable[Row]) -> list[Row]:
    """The rows, each with its `id` first."""
    return [with_id(row) for row in rows]


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt is a list of messages rather than a text."""
    return isinstance(prompt, list)


def render_prompt(tokenizer: Any, prompt: Any) -> str:
    """The text a policy continues: the prompt itself, or the chat template up to the assistant's turn."""
    if not is_conversational(prompt):
        return prompt
    return apply_template(tokenizer, prompt, add_generation_prompt=True)


def apply_template(tokenizer: Any, messages: list[Any], **options: Any) -> str:
    """The messages as one text. Raises UserError where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "the data are conversations but the base model's tokenizer has no chat template; "
            "set prepare.chat_template to plain, choose a chat model in prepare.base_model, or give prompts as text"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def completion_text(completion: Any) -> str:
    """The answer's words: the completion itself, or its messages' contents joined."""
    if not isinstance(completion, list):
        return completion
    return "\n".join(message["content"] for message in completion)


def last_box(solution: Any) -> str | None:
    r"""What stands in the last `\boxed{…}`, braces inside it included; None where there is none or it never closes."""
    if not isinstance(solution, str) or _BOX not in solution:
        return None
    inside = solution[solution.rindex(_BOX) + len(_BOX) :]
    depth = 1
    for place, letter in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return inside[:place]
    return None
