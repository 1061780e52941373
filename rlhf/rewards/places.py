"""Where an answer stands in a text: the form of thoughts and answer, tags, boxes and hashes."""

from __future__ import annotations

import re
from typing import Any

from rlhf.data.formats import completion_text, last_box
from rlhf.params import Place, Tag

FORM = re.compile(r"\s*<think>.*?</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")


def find_answer(completion: Any, place: Place) -> str | None:
    """The answer as it stands at `place`, white space and all; None where it is not there.

    Where several stand there, as several boxes, the last one counts. The form is `<think>…</think><answer>…</answer>`
    with nothing but white space around the two blocks, and each tag once.
    """
    text = completion_text(completion)
    match place:
        case "form":
            match = FORM.fullmatch(text)
            return match["answer"] if match and len(TAG.findall(text)) == 4 else None
        case "answer_tag":
            return _last_block(text, "<answer>", "</answer>")
        case "boxed":
            return last_box(text)
        case "hashes":
            _, found, behind = text.rpartition("####")
            return behind.partition("\n")[0] if found else None
        case "text":
            return text
        case Tag():
            return _last_block(text, place.open, place.close)


def _last_block(text: str, opening: str, closing: str) -> str | None:
    """What the last closing tag closes."""
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    return text[start + len(opening) : end] if start >= 0 else None
