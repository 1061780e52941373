"""The token ledger: every row is accounted for once, and losing too many stops."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.encoding import Reading
from rlhf.errors import UserError
from rlhf.ledger import Ledger, Limit
from rlhf.params import LedgerParams

BEGIN, END = 1, 2
TOKENIZER = SimpleNamespace(bos_token_id=BEGIN, eos_token_id=END, bos_token="<s>")


def make_ledger(on_too_long: Any = "drop", max_lost_share: float = 1.0) -> Ledger:
    return Ledger(LedgerParams(on_too_long=on_too_long, max_lost_share=max_lost_share))


def reading(name: str, *answers: list[int], prompt: tuple[int, ...] = (7, 8)) -> Reading:
    return Reading(name, tuple([*prompt, *answer] for answer in answers), (len(prompt),) * len(answers))


sequences = st.lists(st.integers(3, 6), max_size=9).map(lambda ids: [*ids, END])


@settings(deadline=None, max_examples=200)
@given(
    pairs=st.lists(st.tuples(sequences, sequences), max_size=30),
    limit=st.integers(1, 12),
    on_too_long=st.sampled_from(["drop", "truncate"]),
    is_cuttable=st.booleans(),
)
def test_every_row_is_used_or_left_out_for_one_reason(
    pairs: list[tuple[list[int], list[int]]], limit: int, on_too_long: str, is_cuttable: bool
) -> None:
    ledger = make_ledger(on_too_long)
    rows = [reading(str(number), *pair) for number, pair in enumerate(pairs)]
    kept = ledger.admit("pairs", rows, Limit(limit, "short", is_cuttable), TOKENIZER)
    account = ledger.accounts["pairs"]
    assert account.read == len(rows) == account.used + account.dropped.total() == account.lengths.total()
    assert account.used == len(kept)
    assert all(one.length <= limit and all(one.answers) for one in kept)
    assert all(one.sequences[0] != one.sequences[1] for one in kept)
    cut = [one for one in kept if one.length < rows[int(one.row)].length]
    assert account.truncated >= len(cut)
    assert bool(cut) <= (on_too_long == "truncate" and is_cuttable)
    assert account.without_end == sum(any(END not in answer for answer in one.answers) for one in kept)


def test_reasons_in_their_order() -> None:
    rows = [
        reading("long", [3] * 9, [4]),
        reading("prompt", [3], prompt=(7,) * 6),
        reading("same", [3, 4], [3, 4]),
        reading("same when cut", [3, 4, 5, 6], [3, 4, 5, 5]),
        reading("fine", [3, END], [4, END]),
    ]
    dropping, cutting = make_ledger("drop"), make_ledger("truncate")
    limit = Limit(5, "max_length is 5", is_cuttable=True)
    assert [one.row for one in dropping.admit("a", rows, limit, TOKENIZER)] == ["fine"]
    assert dropping.accounts["a"].dropped == {"too_long": 3, "identical": 1}
    assert [one.row for one in cutting.admit("a", rows, limit, TOKENIZER)] == ["long", "fine"]
    assert cutting.accounts["a"].dropped == {"nothing_trainable": 1, "identical": 2}
    assert cutting.accounts["a"].examples["identical"] == ["same", "same when cut"]


def test_a_long_row_is_refused_and_named() -> None:
    with pytest.raises(UserError, match=r"row r9 of sft/train is 8 tokens long, sft.max_length is 5; raise the limit"):
        make_ledger("raise").admit("sft/train", [reading("r9", [3] * 6)], Limit(5, "sft.max_length is 5"), TOKENIZER)


def test_losing_too_many_rows_stops() -> None:
    rows = [reading(str(number), [3, END]) for number in range(8)] + [reading(f"x{n}", [3] * 9) for n in range(2)]
    make_ledger(max_lost_share=0.2).admit("a", rows, Limit(5, "short"), TOKENIZER)
    sentence = (
        r"a: 2 of 10 rows are left out and 0 cut \(too_long 2, such as x0 x1; short\), above ledger.max_lost_share 0.1"
    )
    with pytest.raises(UserError, match=sentence):
        make_ledger(max_lost_share=0.1).admit("a", rows, Limit(5, "short"), TOKENIZER)


def test_a_prompt_has_no_answer_that_could_lack_its_end() -> None:
    ledger = make_ledger()
    assert ledger.admit("prompts", [Reading("p", ([7, 8],), ())], Limit(5, "short"), TOKENIZER)
    assert ledger.accounts["prompts"].without_end == 0


def test_two_begin_tokens_are_refused() -> None:
    doubled = reading("r1", [3, END], prompt=(BEGIN, BEGIN, 7))
    with pytest.raises(UserError, match=r"row r1 of a begins with the token <s> twice"):
        make_ledger().admit("a", [doubled], Limit(9, "short"), TOKENIZER)
    make_ledger().admit("a", [reading("r1", [3, END], prompt=(BEGIN, 7, BEGIN))], Limit(9, "short"), TOKENIZER)


def test_what_is_written_is_the_same_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        ledger = make_ledger()
        ledger.admit("sft/train", [reading("x", [3, END]), reading("y", [3] * 9)], Limit(5, "short"), TOKENIZER)
        (tmp_path / name).mkdir()
        figures = ledger.write(tmp_path / name)
    assert figures["sft/train"]["tokens"] == {"p50": 4, "p90": 11, "p99": 11, "p100": 11}
    assert json.loads((tmp_path / "a" / "ledger.json").read_text())["sft/train"]["examples"] == {"too_long": ["y"]}
    assert (tmp_path / "a" / "lengths.csv").read_text() == "file,tokens,rows\nsft/train,4,1\nsft/train,11,1\n"
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_no_rows_are_no_trouble(tmp_path: Path) -> None:
    ledger = make_ledger(max_lost_share=0.0)
    assert ledger.admit("a", [], Limit(5, "short"), TOKENIZER) == []
    assert ledger.write(tmp_path)["a"]["read"] == 0
