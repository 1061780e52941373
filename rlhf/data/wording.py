"""What params add to the words of rows: a system turn before conversations, a form that demonstrations keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rlhf.data.formats import Row
from rlhf.errors import UserError

SOLUTION, ANSWER = "{solution}", "{answer}"
"""What stands in a form for the way to the answer, and for the answer."""


def with_system(rows: Iterable[Row], text: str, shown: str) -> Iterator[Row]:
    """The rows with `text` as their conversations' system turn, above what such a turn says already.

    A prompt that is neither messages nor text stays as it is, for validate to set aside. Raises UserError at a text.
    """
    for row in rows:
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            raise UserError(
                f"{shown}: the prompt {prompt[:40]!r} is a text, and only conversations have a system turn; "
                "set prepare.data.system to null, or name a shape that makes messages"
            )
        yield row | {"prompt": _begin_with(prompt, text)} if prompt else row


def _begin_with(prompt: Any, text: str) -> Any:
    if not isinstance(prompt, list) or not isinstance(prompt[0], dict):
        return prompt
    own = prompt[0].get("content") if prompt[0].get("role") == "system" else None
    if own is None:
        return [{"role": "system", "content": text}, *prompt]
    return [{"role": "system", "content": f"{text}\n\n{own}"}, *prompt[1:]]


def in_form(rows: Iterable[Row], form: str) -> Iterator[Row]:
    """Demonstrations written anew: `form` with the solution and the answer in their places.

    The answer is the column `answer`, else what stands behind the last `####`; the solution is the completion's last
    turn up to there. A completion without an answer becomes None, for validate to set aside.
    """
    for row in rows:
        completion = row.get("completion")
        if isinstance(completion, str):
            yield row | {"completion": _fill(form, completion, row.get("answer"))}
        elif isinstance(completion, list) and completion and isinstance(completion[-1], dict):
            text = _fill(form, str(completion[-1].get("content")), row.get("answer"))
            yield row | {"completion": text and [*completion[:-1], completion[-1] | {"content": text}]}
        else:
            yield row


def _fill(form: str, text: str, answer: Any) -> str | None:
    before, mark, behind = text.rpartition("####")
    solution = before if mark else text
    known = behind if answer is None and mark else answer
    if known is None:
        return None
    # The answer first: a solution may contain the word {answer}, an answer hardly {solution}.
    return form.replace(ANSWER, str(known).strip()).replace(SOLUTION, solution.strip())
