"""UKPConvArg1: pairs of arguments with the votes of five workers, in two files that lie side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rlhf.data.files import read_file
from rlhf.data.formats import Row
from rlhf.data.shapes.forms import Message, answer, draw, is_list, is_text, tell, user
from rlhf.errors import UserError

PAIRS, ARGUMENTS = "pairs_5annotators", "arguments"
"""Stems of the two files of UKPConvArg1 (Habernal & Gurevych, ACL 2016)."""
OF_PAIRS = {
    "id": is_text,
    "topic": is_text,
    "title": is_text,
    "arg1": is_text,
    "arg2": is_text,
    "gold": is_text,
    "annotations": is_list,
}
OF_ARGUMENTS = {"id": is_text, "topic": is_text, "stance": is_text, "text": is_text}
"""The columns of the two files, with what their values look like."""


def argument_pairs(rows: Iterable[Row], path: Path | None, shown: str) -> Iterator[Row]:
    """One preference per pair of arguments: the non-tie vote of one worker, drawn by the pair's id.

    `annotator` is the worker; `truth_flipped` says whether the vote is against the gold label of all five.
    Pairs whose gold label is missing or a tie are left out, as are pairs on which everyone voted `equal`.
    """
    return _votes(rows, path, shown, lambda pair, votes: [votes[draw(pair["id"]) % len(votes)]])


def argument_votes(rows: Iterable[Row], path: Path | None, shown: str) -> Iterator[Row]:
    """One preference per vote that is no tie, of the same pairs as `argument_pairs`."""
    return _votes(rows, path, shown, lambda _pair, votes: votes)


def argument_texts(rows: Iterable[Row], path: Path | None, shown: str) -> Iterator[Row]:
    """Every argument as the completion of its topic and stance."""
    pairs, arguments = _files(rows, path, shown)
    titles = {pair["topic"]: pair["title"] for pair in pairs}
    for argument in arguments:
        if argument["topic"] in titles:
            yield {
                "prompt": _prompt(titles[argument["topic"]], argument["stance"]),
                "completion": answer(argument["text"]),
                "source_id": argument["id"],
            }


def argument_prompts(rows: Iterable[Row], path: Path | None, shown: str) -> Iterator[Row]:
    """Every topic and stance once, as a prompt."""
    seen: set[str] = set()
    for row in argument_texts(rows, path, shown):
        text = row["prompt"][0]["content"]
        if text not in seen:
            seen.add(text)
            yield {"prompt": row["prompt"]}


def _votes(
    rows: Iterable[Row], path: Path | None, shown: str, choose: Callable[[Row, list[Row]], list[Row]]
) -> Iterator[Row]:
    """A preference for every vote that `choose` picks among a pair's votes that are no ties."""
    pairs, arguments = _files(rows, path, shown)
    by_id = {argument["id"]: argument for argument in arguments}
    read = without = 0
    for pair in pairs:
        read += 1
        votes = [vote for vote in pair["annotations"] if vote["value"] in ("a1", "a2")]
        if pair["gold"] not in ("a1", "a2") or not votes:
            without += 1
            continue
        for vote in choose(pair, votes):
            yield _preference(pair, vote, by_id, shown)
    tell(f"{shown}: {read} pairs, {without} without a gold winner left out")


def _preference(pair: Row, vote: Row, by_id: dict[str, Row], shown: str) -> Row:
    first, second = _argument(by_id, pair["arg1"], shown), _argument(by_id, pair["arg2"], shown)
    chosen, rejected = (first, second) if vote["value"] == "a1" else (second, first)
    return {
        "prompt": _prompt(pair["title"], first["stance"]),
        "chosen": answer(chosen["text"]),
        "rejected": answer(rejected["text"]),
        "annotator": vote["worker"],
        "source_id": pair["id"],
        "truth_flipped": vote["value"] != pair["gold"],
    }


def _files(rows: Iterable[Row], path: Path | None, shown: str) -> tuple[Iterable[Row], Iterable[Row]]:
    """The pairs and the arguments, whichever of the two files `rows` come from."""
    if path is None:
        raise UserError(f"{shown}: argument shapes need the two files of UKPConvArg1; use a source of kind file")
    remaining = iter(rows)
    first = next(remaining, {})
    own = OF_PAIRS if first.keys() >= OF_PAIRS.keys() else OF_ARGUMENTS
    here = _checked(
        itertools.chain([first], remaining),
        own,
        f"{shown} is neither {PAIRS}.jsonl nor {ARGUMENTS}.jsonl of UKPConvArg1; name one, or use shape canonical",
    )
    if own is OF_PAIRS:
        return here, _sibling(path, shown, ARGUMENTS, OF_ARGUMENTS)
    return _sibling(path, shown, PAIRS, OF_PAIRS), here


def _checked(rows: Iterable[Row], columns: Iterable[str], problem: str) -> Iterator[Row]:
    """The rows, as long as they have the columns."""
    for row in rows:
        if not all(column in row for column in columns):
            raise UserError(problem)
        yield row


def _sibling(path: Path, shown: str, stem: str, columns: Iterable[str]) -> Iterator[Row]:
    for suffix in (".jsonl.gz", ".jsonl"):
        other = path.with_name(stem + suffix)
        if other.exists():
            name = str(Path(shown).with_name(other.name))
            problem = f"{name} lacks one of the columns {', '.join(columns)}; fetch UKPConvArg1 again"
            return _checked(read_file(other, name).rows, columns, problem)
    raise UserError(f"{shown} needs {stem}.jsonl.gz beside it; copy the whole folder of UKPConvArg1")


def _argument(by_id: dict[str, Row], name: str, shown: str) -> Row:
    if name not in by_id:
        raise UserError(
            f"{shown} names the argument {name!r}, which {ARGUMENTS}.jsonl does not hold; fetch both files again"
        )
    return by_id[name]


def _prompt(title: str, stance: str) -> list[Message] | None:
    return user(f"Write a convincing argument on: {_sentence(title)} Stance: {_sentence(stance)}")


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."
