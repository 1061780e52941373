"""Turning rows of well-known data sets into canonical ones."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.data.files import read_file
from rlhf.data.formats import Row
from rlhf.errors import UserError

logger = logging.getLogger(__name__)

PAIRS, ARGUMENTS = "pairs_5annotators", "arguments"
"""Stems of the two files of UKPConvArg1 (Habernal & Gurevych, ACL 2016) that lie side by side."""


def canonical(rows: list[Row], _path: Path | None, _shown: str) -> list[Row]:
    """Rows that are canonical already."""
    return rows


def argument_pairs(rows: list[Row], path: Path | None, shown: str) -> list[Row]:
    """One preference per pair of arguments: the non-tie vote of one worker, drawn by the pair's id.

    `annotator` is the worker; `truth_flipped` says whether the vote is against the gold label of all five.
    Pairs whose gold label is missing or a tie are left out, as are pairs on which everyone voted `equal`.
    """
    pairs, arguments = _files(rows, path, shown)
    by_id = {argument["id"]: argument for argument in arguments}
    preferences: list[Row] = []
    for pair in pairs:
        votes = [vote for vote in pair["annotations"] if vote["value"] in ("a1", "a2")]
        if pair["gold"] not in ("a1", "a2") or not votes:
            continue
        vote = votes[_draw(pair["id"]) % len(votes)]
        first, second = _argument(by_id, pair["arg1"], shown), _argument(by_id, pair["arg2"], shown)
        chosen, rejected = (first, second) if vote["value"] == "a1" else (second, first)
        preferences.append(
            {
                "prompt": _prompt(pair["title"], first["stance"]),
                "chosen": _answer(chosen["text"]),
                "rejected": _answer(rejected["text"]),
                "annotator": vote["worker"],
                "source_id": pair["id"],
                "truth_flipped": vote["value"] != pair["gold"],
            }
        )
    logger.info("%s: %d pairs, %d without a gold winner left out", shown, len(pairs), len(pairs) - len(preferences))
    return preferences


def argument_texts(rows: list[Row], path: Path | None, shown: str) -> list[Row]:
    """Every argument as the completion of its topic and stance."""
    pairs, arguments = _files(rows, path, shown)
    titles = {pair["topic"]: pair["title"] for pair in pairs}
    return [
        {
            "prompt": _prompt(titles[argument["topic"]], argument["stance"]),
            "completion": _answer(argument["text"]),
            "source_id": argument["id"],
        }
        for argument in arguments
        if argument["topic"] in titles
    ]


def argument_prompts(rows: list[Row], path: Path | None, shown: str) -> list[Row]:
    """Every topic and stance once, as a prompt."""
    texts = argument_texts(rows, path, shown)
    distinct = {row["prompt"][0]["content"]: row["prompt"] for row in texts}
    return [{"prompt": prompt} for prompt in distinct.values()]


Shape = Callable[[list[Row], Path | None, str], list[Row]]
SHAPES: dict[str, Shape] = {
    "canonical": canonical,
    "argument_pairs": argument_pairs,
    "argument_texts": argument_texts,
    "argument_prompts": argument_prompts,
}
"""Functions of (rows, the file they come from, its name in messages), by the name in params."""


def _files(rows: list[Row], path: Path | None, shown: str) -> tuple[list[Row], list[Row]]:
    """The pairs and the arguments, whichever of the two files `rows` come from."""
    if path is None:
        raise UserError(f"{shown}: argument shapes need the two files of UKPConvArg1; use a source of kind file")
    if _have(rows, ("id", "topic", "title", "arg1", "arg2", "gold", "annotations")):
        return rows, _sibling(path, shown, ARGUMENTS, ("id", "topic", "stance", "text"))
    if _have(rows, ("id", "topic", "stance", "text")):
        return _sibling(path, shown, PAIRS, ("topic", "title", "annotations")), rows
    raise UserError(
        f"{shown} is neither {PAIRS}.jsonl nor {ARGUMENTS}.jsonl of UKPConvArg1; name one, or use shape canonical"
    )


def _have(rows: list[Row], columns: tuple[str, ...]) -> bool:
    return all(column in row for row in rows for column in columns)


def _sibling(path: Path, shown: str, stem: str, columns: tuple[str, ...]) -> list[Row]:
    for suffix in (".jsonl.gz", ".jsonl"):
        other = path.with_name(stem + suffix)
        if other.exists():
            name = str(Path(shown).with_name(other.name))
            rows = read_file(other, name).rows
            if not _have(rows, columns):
                raise UserError(f"{name} lacks one of the columns {', '.join(columns)}; fetch UKPConvArg1 again")
            return rows
    raise UserError(f"{shown} needs {stem}.jsonl.gz beside it; copy the whole folder of UKPConvArg1")


def _argument(by_id: dict[str, Row], name: str, shown: str) -> Row:
    if name not in by_id:
        raise UserError(
            f"{shown} names the argument {name!r}, which {ARGUMENTS}.jsonl does not hold; fetch both files again"
        )
    return by_id[name]


def _draw(name: str) -> int:
    """A number that depends on the name alone, so that a pair keeps its vote in every subset of the file."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)


def _prompt(title: str, stance: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"Write a convincing argument on: {_sentence(title)} Stance: {_sentence(stance)}"}
    ]


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."


def _answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]
