"""Two answers and a verdict: SHP, PKU-SafeRLHF, and votes with their voters (Arena, AlpacaFarm, TL;DR)."""

from __future__ import annotations

import math
from typing import Any

from rlhf.data.formats import Row
from rlhf.data.shapes.forms import (
    Convert,
    Form,
    Message,
    answer,
    as_flag,
    as_number,
    cut_pair,
    has,
    is_flag,
    is_list,
    is_messages,
    is_number,
    is_text,
    one_of,
    picked,
    prompt_only,
    ranked,
    read_messages,
    user,
)
from rlhf.data.shapes.instructions import instruction_prompt


def shp_preference(row: Row) -> list[Row]:
    """Label 1: comment A is better. The margin is the logarithm of the ratio of the comments' scores."""
    prompt = user(row.get("history"))
    first, second = answer(row.get("human_ref_A")), answer(row.get("human_ref_B"))
    made = picked(prompt, first, second, as_flag(row.get("labels")))
    ratio = as_number(row.get("score_ratio"))
    return [one | ({"margin": math.log(ratio)} if ratio and ratio > 0 else {}) for one in made]


def pku_preference(verdict: str) -> Convert:
    """The answer whose number (0 or 1) stands under `verdict`."""

    def convert(row: Row) -> list[Row]:
        number = as_flag(row.get(verdict))
        first, second = answer(row.get("response_0")), answer(row.get("response_1"))
        return picked(user(row.get("prompt")), first, second, None if number is None else not number)

    return convert


def pku_ratings(row: Row) -> list[Row]:
    """Both answers, each rated by its severity with the sign turned: 0 is harmless, −3 the worst."""
    levels = [as_number(row.get(f"response_{number}_severity_level")) for number in (0, 1)]
    return [
        {
            "prompt": user(row.get("prompt")),
            "completion": answer(row.get(f"response_{number}")),
            "score": None if level is None else 0.0 - level,
            "is_safe": as_flag(row.get(f"is_response_{number}_safe")),
        }
        for number, level in enumerate(levels)
    ]


def arena_preference(row: Row) -> list[Row]:
    """A judge's verdict on two conversations; a tie of either kind is no preference.

    Verdicts on the first turn (`turn` 1 in MT-Bench) see the conversations up to the first answer.
    """
    first, second = (_until(read_messages(row.get(f"conversation_{side}")), row.get("turn")) for side in "ab")
    prompt, one, other = cut_pair(first, second)
    if str(row.get("winner")).startswith("tie"):
        return []
    is_first = {"model_a": True, "model_b": False}.get(str(row.get("winner")))
    return [made | {"annotator": row.get("judge")} for made in picked(prompt, one, other, is_first)]


def _until(messages: list[Message] | None, turn: Any) -> list[Message] | None:
    """The conversation up to the answer of that number, counted from 1."""
    if messages is None or not isinstance(turn, int) or turn < 1:
        return messages
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[turn - 1] + 1] if turn <= len(answers) else messages


def alpaca_farm_preference(row: Row) -> list[Row]:
    """An annotator's choice, 1 or 2; 0 and 1.5 are ties."""
    choice = as_number(row.get("preference"))
    lead = {1: 1.0, 2: -1.0, 0: 0.0, 1.5: 0.0}.get(choice) if choice is not None else None
    made = ranked(instruction_prompt(row), answer(row.get("output_1")), answer(row.get("output_2")), lead)
    kept = ("prompt", "chosen", "rejected")
    return [{name: one[name] for name in kept} | {"annotator": row.get("annotator_index")} for one in made]


def llmbar_preference(row: Row) -> list[Row]:
    """The label, 1 or 2, is the number of the better answer."""
    label = as_number(row.get("label"))
    is_first = {1: True, 2: False}.get(int(label)) if label is not None else None
    return picked(user(row.get("input")), answer(row.get("output_1")), answer(row.get("output_2")), is_first)


def summary_preference(row: Row) -> list[Row]:
    """A worker's choice, 0 or 1, between two summaries of a post or article."""
    summaries = row.get("summaries")
    objects = summaries if isinstance(summaries, list) else []
    texts = [one.get("text") if isinstance(one, dict) else None for one in objects]
    first, second = (answer(text) for text in texts) if len(texts) == 2 else (None, None)
    choice = as_flag(row.get("choice"))
    made = picked(summary_prompt(row), first, second, None if choice is None else not choice)
    return [one | {"annotator": row.get("worker")} for one in made]


def summary_prompt(row: Row) -> list[Message] | None:
    info = row.get("info")
    text = (info.get("post") or info.get("article")) if isinstance(info, dict) else None
    return user(f"Summarise this text.\n\n{text.strip()}") if isinstance(text, str) else None


def _prompt(row: Row) -> list[Message] | None:
    return user(row.get("prompt"))


SHP = {"history": is_text, "human_ref_A": is_text, "human_ref_B": is_text, "labels": is_flag}
PKU = {"prompt": is_text, "response_0": is_text, "response_1": is_text}
PKU_IDS = ("better_response_id", "safer_response_id")
PKU_SAFETY = tuple(f"is_response_{number}_safe" for number in (0, 1))
PKU_SEVERITY = tuple(f"response_{number}_severity_level" for number in (0, 1))
CONVERSATIONS = {"conversation_a": is_messages, "conversation_b": is_messages}
FORMS = {
    "shp_preferences": Form(SHP, shp_preference, ("score_ratio",)),
    "shp_prompts": Form(SHP, prompt_only(lambda row: user(row.get("history"))), ("score_ratio",), True),
    "pku_helpful_preferences": Form(
        PKU | {"better_response_id": is_flag}, pku_preference("better_response_id"), ("safer_response_id",)
    ),
    "pku_safe_preferences": Form(
        PKU | {"safer_response_id": is_flag}, pku_preference("safer_response_id"), ("better_response_id",)
    ),
    "pku_severity_ratings": Form(PKU | dict.fromkeys(PKU_SEVERITY, is_number), pku_ratings, (*PKU_SAFETY, *PKU_IDS)),
    "pku_prompts": Form(PKU, prompt_only(_prompt), (*PKU_IDS, *PKU_SAFETY, *PKU_SEVERITY), True),
    "arena_preferences": Form(
        CONVERSATIONS | {"winner": one_of("model_a", "model_b", "tie", "tie (bothbad)", "tie (inconsistent)")},
        arena_preference,
        ("judge",),
    ),
    "alpaca_farm_preferences": Form(
        {"instruction": is_text, "output_1": is_text, "output_2": is_text, "preference": is_number},
        alpaca_farm_preference,
        ("input", "annotator_index"),
    ),
    "llmbar_preferences": Form(
        {"input": is_text, "output_1": is_text, "output_2": is_text, "label": is_number}, llmbar_preference
    ),
    "summary_preferences": Form(
        {"info": has("id"), "summaries": is_list, "choice": is_flag}, summary_preference, ("worker",)
    ),
    "summary_prompts": Form(
        {"info": has("id"), "summaries": is_list}, prompt_only(summary_prompt), ("choice", "worker"), True
    ),
}
