"""HelpSteer, HelpSteer2 and HelpSteer3: five ratings per answer, and preferences from −3 to 3."""

from __future__ import annotations

import re

from rlhf.data.formats import Row
from rlhf.data.shapes.forms import (
    Form,
    Message,
    answer,
    as_number,
    is_messages,
    is_number,
    is_text,
    mean,
    prompt_only,
    ranked,
    read_messages,
    user,
)

QUALITIES = ("helpfulness", "correctness", "coherence")
"""The three of the five ratings that say how good an answer is; complexity and verbosity say what it is like."""
TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")
"""What separates the turns of a prompt of several in HelpSteer2."""


def helpsteer_prompt(row: Row) -> list[Message] | None:
    """The turns of a prompt, which are separated by markers after the first."""
    if not isinstance(row.get("prompt"), str):
        return None
    first, *rest = TURN.split(row["prompt"])
    turns = zip(rest[::2], rest[1::2], strict=True)
    return [{"role": "user", "content": first}] + [{"role": role.lower(), "content": text} for role, text in turns]


def helpsteer_rating(row: Row) -> list[Row]:
    """The rating that `columns` names as `score`, else the mean of the three qualities."""
    score = as_number(row["score"]) if "score" in row else mean(row.get(name) for name in QUALITIES)
    return [{"prompt": helpsteer_prompt(row), "completion": answer(row.get("response")), "score": score}]


def helpsteer2_preference(row: Row) -> list[Row]:
    """Strength below 0: the first answer is better; above 0: the second; 0: neither."""
    strength = as_number(row.get("preference_strength"))
    first, second = answer(row.get("response_1")), answer(row.get("response_2"))
    return ranked(helpsteer_prompt(row), first, second, None if strength is None else -strength)


def helpsteer3_preference(row: Row) -> list[Row]:
    """Signs as in HelpSteer2."""
    strength = as_number(row.get("overall_preference"))
    first, second = answer(row.get("response1")), answer(row.get("response2"))
    return ranked(helpsteer3_prompt(row), first, second, None if strength is None else -strength)


def helpsteer3_prompt(row: Row) -> list[Message] | None:
    context = row.get("context")
    return user(context) if isinstance(context, str) else read_messages(context)


RATED = {"prompt": is_text, "response": is_text}
COMPARED = {
    "prompt": is_text,
    "response_1": is_text,
    "response_2": is_text,
    "preference_strength": is_number,
}
FORMS = {
    "helpsteer_ratings": Form(RATED | {"verbosity": is_number}, helpsteer_rating, (*QUALITIES, "complexity", "score")),
    "helpsteer_prompts": Form(
        RATED | {"verbosity": is_number},
        prompt_only(helpsteer_prompt),
        (*QUALITIES, "complexity"),
        is_distinct=True,
    ),
    "helpsteer2_preferences": Form(COMPARED, helpsteer2_preference),
    "helpsteer3_preferences": Form(
        {"context": is_messages, "response1": is_text, "response2": is_text, "overall_preference": is_number},
        helpsteer3_preference,
    ),
    "helpsteer3_prompts": Form(
        {"context": is_messages, "response1": is_text, "response2": is_text},
        prompt_only(helpsteer3_prompt),
        ("overall_preference",),
        is_distinct=True,
    ),
}
