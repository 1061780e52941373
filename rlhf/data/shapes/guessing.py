"""Which shape rows have, told by the names of their columns and by what their values look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.formats import Row
from rlhf.data.shapes import arguments
from rlhf.data.shapes.forms import Form, is_messages, is_number, is_text
from rlhf.data.shapes.table import FORMS
from rlhf.params import kind_of_shape

Test = Callable[[Any], bool]
SAMPLE = 100
"""How many rows a guess looks at."""


@dataclass(frozen=True)
class Guess:
    """A shape that fits, the kind of rows it gives, and the columns to be named differently before."""

    shape: str
    kind: str
    columns: Mapping[str, str]


def guess_shapes(sample: Sequence[Row]) -> list[Guess]:
    """Every shape that fits the rows, the one that explains most of their columns first.

    A shape fits if its columns are there, the first value in each of them that is not null looks right, and some row
    can be converted whole. Where none fits, the canonical kinds are tried under names that such columns often have.
    """
    firsts = first_values(sample)
    fitting = [
        (Guess(shape, kind, {}), len(columns))
        for shape, kind, columns in _known()
        if all(name in firsts and (firsts[name] is None or test(firsts[name])) for name, test in columns.items())
        and (shape not in FORMS or _converts(FORMS[shape], sample))
    ]
    # sorted() is stable: among equals the order of the table decides.
    guesses = [guess for guess, _ in sorted(fitting, key=lambda fit: -fit[1])]
    return guesses or _renamed(firsts)


def first_values(sample: Sequence[Row]) -> Row:
    """The first value that is not null of every column, None where all are."""
    firsts: Row = {}
    for row in sample:
        for name, value in row.items():
            if firsts.get(name) is None:
                firsts[name] = value
    return firsts


def _converts(form: Form, sample: Sequence[Row]) -> bool:
    """Whether a row gives something whole, or nothing, which a tie does."""
    return any(None not in made.values() for row in sample for made in form.convert(row) or [{}])


def _known() -> list[tuple[str, str, Mapping[str, Test]]]:
    known = [(shape, str(kind_of_shape(shape)), form.columns) for shape, form in FORMS.items()]
    known += [("canonical", kind, columns) for kind, columns in CANONICAL.items()]
    known += [
        (shape, str(kind_of_shape(shape)), columns)
        for columns, shapes in (
            (arguments.OF_PAIRS, ("argument_pairs", "argument_votes")),
            (arguments.OF_ARGUMENTS, ("argument_texts", "argument_prompts")),
        )
        for shape in shapes
    ]
    return known


def _renamed(firsts: Row) -> list[Guess]:
    """The canonical kinds that the columns could serve under other names."""
    guesses: list[Guess] = []
    for kind, columns in CANONICAL.items():
        mapping: dict[str, str] = {}
        for name, test in columns.items():
            free = [alias for alias in ALIASES[name] if alias in firsts and alias not in mapping.values()]
            if usual := next((alias for alias in free if test(firsts[alias])), None):
                mapping[name] = usual
        if len(mapping) == len(columns):
            guesses.append(Guess("canonical", kind, {name: usual for name, usual in mapping.items() if name != usual}))
    return guesses


def _is_prompt(value: Any) -> bool:
    return is_text(value) or (is_messages(value) and "role" in value[-1] and value[-1]["role"] != "assistant")


def _is_answer(value: Any) -> bool:
    return is_text(value) or (is_messages(value) and value[0].get("role") == "assistant")


CANONICAL: dict[str, Mapping[str, Test]] = {
    "preferences": {"prompt": _is_prompt, "chosen": _is_answer, "rejected": _is_answer},
    "ratings": {"prompt": _is_prompt, "completion": _is_answer, "score": is_number},
    "sft": {"prompt": _is_prompt, "completion": _is_answer},
    "prompts": {"prompt": _is_prompt},
}
ALIASES = {
    "prompt": ("prompt", "question", "query", "instruction", "problem", "input", "history", "context", "body"),
    "completion": ("completion", "response", "answer", "output", "solution", "reply", "target", "text"),
    "chosen": ("chosen", "better", "preferred", "winner", "positive", "good", "best", "accepted"),
    "rejected": ("rejected", "worse", "dispreferred", "loser", "negative", "bad", "worst", "other"),
    "score": ("score", "rating", "reward", "grade", "stars", "label"),
}
"""Names under which such columns are often found."""
