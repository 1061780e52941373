"""How a model is asked for tasks and for answers, and how they are read out of what it says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlhf.evaluation.generation import Completion

_TASK = re.compile(r"^[ \t*#]*Task[ \t]+\d+[ \t*]*[.:)][ \t*]*", re.MULTILINE | re.IGNORECASE)
_NUMBER = re.compile(r"^[ \t*]*\d+[.:)][ \t*]+", re.MULTILINE)
_NEXT = "\n\nTask:"
Demonstration = tuple[str, str]
"""An instruction and its answer."""


def ask_for_tasks(examples: Sequence[str], is_chat: bool) -> Any:
    """A numbered list of tasks to go on with; for a chat model, the request to do so."""
    listed = "\n\n".join(f"Task {number}: {text}" for number, text in enumerate(examples, 1))
    following = len(examples) + 1
    if not is_chat:
        return f"Tasks of many kinds, each complete in itself.\n\n{listed}\n\nTask {following}:"
    request = (
        f"Here are tasks that people set an assistant:\n\n{listed}\n\nWrite {len(examples)} more tasks on quite "
        "different subjects. Each must hold all that is needed to solve it. Do not solve any. "
        f"Begin them with 'Task {following}:', 'Task {following + 1}:' and so on."
    )
    return [{"role": "user", "content": request}]


def read_tasks(said: Completion, is_chat: bool) -> list[tuple[str, bool]]:
    """The tasks in a list that a model wrote, each with whether it is whole: the last one is not where it was cut off.

    What stands before a chat model's first number is no task.
    """
    text = said.text if is_chat else f"Task 0: {said.text.lstrip()}"
    mark = _TASK if _TASK.search(text) else _NUMBER
    parts = [part.strip() for part in mark.split(text)[1:]]
    return [(part, said.ended or place < len(parts) - 1) for place, part in enumerate(parts)]


def ask_for_answer(instruction: str, shown: Sequence[Demonstration], is_chat: bool) -> Any:
    """The instruction itself for a chat model; for another, some tasks with answers before it."""
    if is_chat:
        return [{"role": "user", "content": instruction}]
    solved = "".join(f"Task: {task}\nAnswer: {answer}\n\n" for task, answer in shown)
    return f"{solved}Task: {instruction}\nAnswer:"


def read_answer(said: Completion, is_chat: bool) -> tuple[str, bool]:
    """The answer and whether it is whole; of a text that goes on to the next task, what stands before that."""
    text, mark, _ = said.text.partition(_NEXT) if not is_chat else (said.text, "", "")
    return text.strip(), said.ended or bool(mark)
