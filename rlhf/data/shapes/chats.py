"""Conversations: ShareGPT and LLaMA-Factory, lists of messages, and the transcripts of Anthropic's HH."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rlhf.data.formats import Row
from rlhf.data.shapes.forms import (
    Convert,
    Form,
    Message,
    as_flag,
    cut_answer,
    cut_pair,
    is_flag,
    is_messages,
    is_turn,
    prompt_only,
    read_messages,
)

SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def read_transcript(text: Any) -> list[Message] | None:
    """The turns of a text, each headed `Human:` or `Assistant:` after an empty line; None where it begins otherwise."""
    if not isinstance(text, str):
        return None
    before, *rest = SPEAKER.split(text)
    if before.strip() or not rest:
        return None
    turns = zip(rest[::2], rest[1::2], strict=True)
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in turns]


def is_transcript(value: Any) -> bool:
    return read_transcript(value) is not None


def _preference(read: Callable[[Any], list[Message] | None]) -> Convert:
    """Two whole conversations that begin alike."""

    def convert(row: Row) -> list[Row]:
        prompt, chosen, rejected = cut_pair(read(row.get("chosen")), read(row.get("rejected")))
        return [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]

    return convert


def _demonstration(read: Callable[[Row], list[Message] | None]) -> Convert:
    """The last answer of a conversation, to all that comes before it."""

    def convert(row: Row) -> list[Row]:
        prompt, completion = cut_answer(read(row))
        return [{"prompt": prompt, "completion": completion}]

    return convert


def _rating(read: Callable[[Row], list[Message] | None], label: str) -> Convert:
    """The last answer of a conversation: 1 where its label is true, 0 where it is false."""

    def convert(row: Row) -> list[Row]:
        prompt, completion = cut_answer(read(row))
        flag = as_flag(row.get(label))
        return [{"prompt": prompt, "completion": completion, "score": None if flag is None else float(flag)}]

    return convert


def _prompt(read: Callable[[Row], list[Message] | None]) -> Convert:
    return prompt_only(lambda row: cut_answer(read(row))[0])


def sharegpt_preference(row: Row) -> list[Row]:
    """The conversation is the prompt, the two answers are one turn each."""
    prompt = _conversation(row)
    chosen, rejected = (read_messages([row.get(side)]) for side in ("chosen", "rejected"))
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]


def _conversation(row: Row) -> list[Message] | None:
    return read_messages(row.get("conversations"), row.get("system"))


def _messages(row: Row) -> list[Message] | None:
    return read_messages(row.get("messages"), row.get("system"))


def _chosen(row: Row) -> list[Message] | None:
    return read_messages(row.get("chosen"))


def _chosen_transcript(row: Row) -> list[Message] | None:
    return read_transcript(row.get("chosen"))


SYSTEM = ("system",)
TURNS, MESSAGES = {"conversations": is_messages}, {"messages": is_messages}
TWO_TURNS = TURNS | {"chosen": is_turn, "rejected": is_turn}
TWO_CHATS = {"chosen": is_messages, "rejected": is_messages}
TWO_TRANSCRIPTS = {"chosen": is_transcript, "rejected": is_transcript}
FORMS = {
    "hh_preferences": Form(TWO_TRANSCRIPTS, _preference(read_transcript)),
    "hh_sft": Form(TWO_TRANSCRIPTS, _demonstration(_chosen_transcript)),
    "hh_prompts": Form(TWO_TRANSCRIPTS, _prompt(_chosen_transcript), is_distinct=True),
    "sharegpt_preferences": Form(TWO_TURNS, sharegpt_preference, SYSTEM),
    "sharegpt_ratings": Form(TURNS | {"kto_tag": is_flag}, _rating(_conversation, "kto_tag"), SYSTEM),
    "sharegpt_sft": Form(TURNS, _demonstration(_conversation), SYSTEM),
    "sharegpt_prompts": Form(TURNS, _prompt(_conversation), SYSTEM, is_distinct=True),
    "messages_preferences": Form(TWO_CHATS, _preference(read_messages), ("prompt",)),
    "messages_ratings": Form(MESSAGES | {"label": is_flag}, _rating(_messages, "label"), SYSTEM),
    "messages_sft": Form(MESSAGES, _demonstration(_messages), ("prompt", *SYSTEM)),
    "messages_prompts": Form(MESSAGES, _prompt(_messages), ("prompt", *SYSTEM), is_distinct=True),
}
