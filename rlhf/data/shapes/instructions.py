"""Single answers: Alpaca, Self-Instruct seeds, thumbs up or down, and film reviews to go on with."""

from __future__ import annotations

import re
from typing import Any

from rlhf.data.formats import Row
from rlhf.data.shapes.forms import (
    Form,
    Message,
    answer,
    as_flag,
    is_flag,
    is_list,
    is_messages,
    is_text,
    prompt_only,
    read_messages,
    user,
)

OPENING = re.compile(r"\s*(?:\S+\s+){7}\S+(?=\s)")
"""The first eight words of a text that goes on after them."""


def instruction_prompt(row: Row) -> list[Message] | None:
    """The instruction with its input below, after a system message and the turns of `history` where there are any."""
    told, given = row.get("instruction"), row.get("input")
    if not isinstance(told, str):
        return None
    text = f"{told}\n{given}" if isinstance(given, str) and given.strip() else told
    earlier = row.get("history") or []
    pairs = [turn for turn in earlier if isinstance(turn, list) and len(turn) == 2] if is_list(earlier) else []
    turns = [
        turn for asked, said in pairs for turn in ({"from": "user", "value": asked}, {"from": "gpt", "value": said})
    ]
    return read_messages([*turns, {"from": "user", "value": text}], row.get("system"))


def alpaca_demonstration(row: Row) -> list[Row]:
    return [{"prompt": instruction_prompt(row), "completion": answer(row.get("output"))}]


def alpaca_preference(row: Row) -> list[Row]:
    """LLaMA-Factory's pairs: the instruction and two texts."""
    chosen, rejected = answer(row.get("chosen")), answer(row.get("rejected"))
    return [{"prompt": instruction_prompt(row), "chosen": chosen, "rejected": rejected}]


def alpaca_rating(row: Row) -> list[Row]:
    """LLaMA-Factory's thumbs: 1 where `kto_tag` is true, 0 where it is false."""
    return [made | {"score": _thumb(row.get("kto_tag"))} for made in alpaca_demonstration(row)]


def seed_demonstrations(row: Row) -> list[Row]:
    """One row per instance of a seed task."""
    instances = row.get("instances")
    objects = [one for one in instances if isinstance(one, dict)] if isinstance(instances, list) else []
    return [made for one in objects or [{}] for made in alpaca_demonstration(row | {"input": None} | one)]


def seed_prompts(row: Row) -> list[Row]:
    return [{"prompt": made["prompt"]} for made in seed_demonstrations(row)]


def thumb_rating(row: Row) -> list[Row]:
    """An answer with a thumb: 1 for up, 0 for down; texts and messages both become messages."""
    prompt, completion = row.get("prompt"), row.get("completion")
    return [
        {
            "prompt": user(prompt) or read_messages(prompt),
            "completion": answer(completion) or read_messages(completion),
            "score": _thumb(row.get("label")),
        }
    ]


def review_demonstration(row: Row) -> list[Row]:
    """A review's first eight words as the prompt, the rest as the completion: plain text, for going on with it."""
    opening, rest = _opening(row.get("text"))
    return [{"prompt": opening, "completion": rest}]


def review_rating(row: Row) -> list[Row]:
    """As above, with the label (1 is favourable, 0 is not) as the score."""
    return [made | {"score": _thumb(row.get("label"))} for made in review_demonstration(row)]


def _opening(text: Any) -> tuple[str | None, str | None]:
    found = OPENING.match(text) if isinstance(text, str) else None
    return (found[0], text[found.end() :]) if found else (None, None)


def _thumb(value: Any) -> float | None:
    flag = as_flag(value)
    return None if flag is None else float(flag)


def _is_said(value: Any) -> bool:
    return is_text(value) or is_messages(value)


AROUND = ("input", "system", "history")
ALPACA = {"instruction": is_text, "output": is_text}
SEED = {"instruction": is_text, "instances": is_list}
REVIEW = {"text": is_text, "label": is_flag}
FORMS = {
    "alpaca_preferences": Form(
        {"instruction": is_text, "chosen": is_text, "rejected": is_text}, alpaca_preference, AROUND
    ),
    "alpaca_ratings": Form(ALPACA | {"kto_tag": is_flag}, alpaca_rating, AROUND),
    "alpaca_sft": Form(ALPACA, alpaca_demonstration, AROUND),
    "alpaca_prompts": Form(ALPACA, prompt_only(instruction_prompt), AROUND, is_distinct=True),
    "self_instruct_sft": Form(SEED, seed_demonstrations),
    "self_instruct_prompts": Form(SEED, seed_prompts, is_distinct=True),
    "kto_ratings": Form({"prompt": _is_said, "completion": _is_said, "label": is_flag}, thumb_rating),
    "imdb_ratings": Form(REVIEW, review_rating),
    "imdb_sft": Form(REVIEW, review_demonstration),
    "imdb_prompts": Form(REVIEW, prompt_only(lambda row: _opening(row.get("text"))[0]), is_distinct=True),
}
