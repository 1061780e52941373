"""Rewards of the form: blocks between tags, in order, counted, or each for itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from rlhf.data.formats import completion_text
from rlhf.params import Tag

Blocks = Sequence[str | Tag]
"""`think` stands for `<think>…</think>`."""


def format_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    blocks: Blocks,
    form: Literal["whole", "lines", "somewhere"],
    **_: Any,
) -> list[float]:
    """1 where the blocks stand in their order, 0 elsewhere.

    `whole`: nothing but white space around them, and each tag once; `lines`: the same, each tag on a line of its own;
    `somewhere`: text may stand around them, and tags again.
    """
    texts = [completion_text(completion) for completion in completions]
    return [float(_keeps(text, _tags(blocks), form)) for text in texts]


def tag_count_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, blocks: Blocks, trailing: float, **_: Any
) -> list[float]:
    """The share of the tags that stand exactly once, less `trailing` per character behind the last of them, at least 0.

    White space at the end counts for nothing.
    """
    tags = [tag for pair in _tags(blocks) for tag in pair]

    def score(text: str) -> float:
        share = sum(text.count(tag) == 1 for tag in tags) / len(tags)
        behind = text.rpartition(tags[-1])[2] if tags[-1] in text else ""
        return max(0.0, share - trailing * len(behind.strip()))

    return [score(completion_text(completion)) for completion in completions]


def tag_points_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, blocks: Blocks, once: float, otherwise: float, **_: Any
) -> list[float]:
    """The sum over all tags of `once` for one that stands exactly once, else of `otherwise`."""
    tags = [tag for pair in _tags(blocks) for tag in pair]
    texts = [completion_text(completion) for completion in completions]
    return [float(sum(once if text.count(tag) == 1 else otherwise for tag in tags)) for text in texts]


def _tags(blocks: Blocks) -> list[tuple[str, str]]:
    """What opens and what closes each block."""
    return [(block.open, block.close) if isinstance(block, Tag) else (f"<{block}>", f"</{block}>") for block in blocks]


def _keeps(text: str, tags: Sequence[tuple[str, str]], form: str) -> bool:
    if form == "somewhere":
        return _in_order(text, tags)
    if any(text.count(tag) != 1 for pair in tags for tag in pair):
        return False
    block = r"{}\n.*?\n{}" if form == "lines" else r"{}.*?{}"
    between = r"\n" if form == "lines" else r"\s*"
    blocks = between.join(block.format(re.escape(opening), re.escape(closing)) for opening, closing in tags)
    return re.fullmatch(rf"\s*{blocks}\s*", text, re.DOTALL) is not None


def _in_order(text: str, tags: Sequence[tuple[str, str]]) -> bool:
    position = 0
    for tag in (tag for pair in tags for tag in pair):
        found = text.find(tag, position)
        if found < 0:
            return False
        position = found + len(tag)
    return True
