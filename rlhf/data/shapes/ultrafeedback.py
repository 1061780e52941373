"""UltraFeedback: pairs with scores, and the original with ratings of several aspects for each of several answers."""

from __future__ import annotations

from typing import Any

from rlhf.data.formats import Row
from rlhf.data.shapes.forms import (
    Form,
    answer,
    as_number,
    cut_answer,
    cut_pair,
    draw,
    is_list,
    is_messages,
    is_number,
    is_text,
    mean,
    prompt_only,
    ranked,
    read_messages,
    user,
)


def binarized_preference(row: Row) -> list[Row]:
    """The prompt is what the two conversations share; the margin is the difference of their scores, none at 0."""
    prompt, chosen, rejected = cut_pair(read_messages(row.get("chosen")), read_messages(row.get("rejected")))
    scores = as_number(row.get("score_chosen")), as_number(row.get("score_rejected"))
    lead = None if scores[0] is None or scores[1] is None else scores[0] - scores[1]
    return ranked(prompt, chosen, rejected, lead)


def binarized_demonstration(row: Row) -> list[Row]:
    prompt, completion = cut_answer(read_messages(row.get("chosen")))
    return [{"prompt": prompt, "completion": completion}]


def aspect_ratings(row: Row) -> list[Row]:
    """One row per answer, its score the mean over the aspects that were rated (from 1 to 5)."""
    prompt = user(row.get("instruction"))
    return [
        {"prompt": prompt, "completion": text, "score": score, "model": model}
        for text, score, model in _rated(row) or [(None, None, None)]
    ]


def aspect_preference(row: Row) -> list[Row]:
    """The best answer against one of the answers that are worse, drawn by the instruction; none where all are equal."""
    prompt = user(row.get("instruction"))
    rated = [(text, score) for text, score, _ in _rated(row) if text is not None and score is not None]
    if len(rated) < 2:
        return ranked(prompt, None, None, None)
    best = max(rated, key=lambda one: one[1])
    worse = [one for one in rated if one[1] < best[1]]
    if not worse:
        return []
    other = worse[draw(str(row.get("instruction"))) % len(worse)]
    return ranked(prompt, best[0], other[0], best[1] - other[1])


def _rated(row: Row) -> list[tuple[Any, float | None, Any]]:
    completions = row.get("completions")
    objects = [one for one in completions if isinstance(one, dict)] if isinstance(completions, list) else []
    return [(answer(one.get("response")), _score(one.get("annotations")), one.get("model")) for one in objects]


def _score(annotations: Any) -> float | None:
    """The mean of the aspects' ratings; one that is N/A counts for nothing."""
    if not isinstance(annotations, dict):
        return None
    return mean(aspect.get("Rating") for aspect in annotations.values() if isinstance(aspect, dict))


PAIR = {"chosen": is_messages, "rejected": is_messages, "score_chosen": is_number, "score_rejected": is_number}
SPARE = ("prompt", "messages")
"""What repeats parts of the two conversations."""
ASPECTS = {"instruction": is_text, "completions": is_list}
FORMS = {
    "ultrafeedback_preferences": Form(ASPECTS, aspect_preference, ("models",)),
    "ultrafeedback_ratings": Form(ASPECTS, aspect_ratings, ("models",)),
    "ultrafeedback_prompts": Form(ASPECTS, prompt_only(lambda row: user(row.get("instruction"))), ("models",), True),
    "ultrafeedback_binarized_preferences": Form(PAIR, binarized_preference, SPARE),
    "ultrafeedback_binarized_sft": Form(PAIR, binarized_demonstration, (*SPARE, "score_chosen")),
    "ultrafeedback_binarized_prompts": Form(
        PAIR, prompt_only(lambda row: cut_answer(read_messages(row.get("chosen")))[0]), SPARE, True
    ),
}
