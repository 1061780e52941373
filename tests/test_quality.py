"""The quality of rows that are sound one by one: every check on cases whose result is known, then in the stage."""

from __future__ import annotations

import gzip
import json
import re
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.expectations import open_context
from rlhf.data.formats import Row, with_ids
from rlhf.data.quality import cycles as cycles_module
from rlhf.data.quality.answers import STYLE, holds, last_turn, make_plain, standardise
from rlhf.data.quality.assessment import Assessment, assess
from rlhf.data.quality.contamination import HeldOut
from rlhf.data.quality.cycles import find_cycles
from rlhf.data.quality.near_duplicates import find_minima, find_near_duplicates, resemblance, sketch
from rlhf.data.quality.position import judge_position
from rlhf.data.quality.verdict import Verdict, judge_quality
from rlhf.data.quality.words import hash_runs, hash_words
from rlhf.data.sources import Rows
from rlhf.errors import UserError
from tasks.paths import Paths
from tests.conftest import SHARED
from tests.validation import add, check, quality

# words --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(alphabet="aAbB1 ,.\n", max_size=30), max_size=6), st.integers(1, 4))
def test_words_and_runs_are_equal_where_the_texts_say_the_same(texts: list[str], size: int) -> None:
    expected = [re.findall("[a-z0-9]+", text.lower()) for text in texts]
    words = hash_words(texts)
    assert words.counts.tolist() == [len(own) for own in expected]
    flat = [word for own in expected for word in own]
    assert len(set(zip(flat, words.hashes.tolist(), strict=True))) == len(set(flat)) == len(set(words.hashes.tolist()))
    runs = [
        tuple(own[place : place + size])
        for own in expected
        for place in range(max(1, len(own) - size + 1) if own else 0)
    ]
    hashes, counts = hash_runs(words, size)
    assert counts.sum() == len(runs)
    assert len(set(zip(runs, hashes.tolist(), strict=True))) == len(set(runs)) == len(set(hashes.tolist()))


def test_a_letter_of_a_script_without_spaces_is_a_word() -> None:
    assert hash_words(["数学题3个", "Grüße, Welt!", "", "Большой мир"]).counts.tolist() == [5, 2, 0, 2]
    one, other = hash_words(["ÄRGER"]).hashes, hash_words(["…ärger?"]).hashes
    assert one.tolist() == other.tolist()


# near duplicates ----------------------------------------------------------------------------------


def sketches(*texts: str) -> np.ndarray:
    return sketch(find_minima(hash_words(texts)))


def exact_resemblance(one: str, other: str) -> float:
    first, second = ({tuple(text.split()[n : n + 3]) for n in range(len(text.split()) - 2)} for text in (one, other))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("changed", [0, 2, 5, 12, 40, 200])
def test_the_resemblance_is_that_of_the_runs_of_words(changed: int) -> None:
    from datasketch import MinHash

    words = [f"word{number}" for number in range(200)]
    generator = np.random.default_rng(changed)
    places = set(generator.choice(200, changed, replace=False).tolist())
    one, other = " ".join(words), " ".join("other" if n in places else word for n, word in enumerate(words))
    ours = sketches(one, other)
    exact = exact_resemblance(one, other)
    assert resemblance(ours[0], ours[1]) == pytest.approx(exact, abs=4 * (0.25 / 64) ** 0.5)
    theirs = [MinHash(num_perm=256) for _ in range(2)]
    for minhash, text in zip(theirs, (one, other), strict=True):
        minhash.update_batch([" ".join(text.split()[n : n + 3]).encode() for n in range(198)])
    assert theirs[0].jaccard(theirs[1]) == pytest.approx(float(resemblance(ours[0], ours[1])), abs=0.25)


def test_the_resemblance_has_no_bias() -> None:
    """Twenty-five of thirty runs in common, 200 pairs of texts; the standard error is that of 200 · 64 draws."""
    generator = np.random.default_rng(1)
    found: list[float] = []
    for _ in range(200):
        words = [str(word) for word in generator.integers(0, 10**9, 32)]
        ours = sketches(" ".join(words), " ".join(words[:27]))
        found.append(float(resemblance(ours[0], ours[1])))
    assert np.mean(found) == pytest.approx(25 / 30, abs=4 * (5 / 36 / 64 / 200) ** 0.5)


def essay(number: int, size: int = 60) -> str:
    return " ".join(f"t{number}w{place}" for place in range(size))


def test_near_duplicates_are_found_within_a_split() -> None:
    near = essay(3).replace("w30", "changed")
    prompts = [essay(n) for n in range(6)] + [essay(3), near, essay(4), essay(2)]
    answers = [essay(10 + n) for n in range(6)] + [essay(13), essay(13), essay(99), essay(12)]
    contents = np.array([0, 1, 2, 3, 4, 5, 3, 7, 8, 9], dtype=np.uint64)
    groups = np.array([0] * 9 + [1])
    both = np.stack([sketches(*prompts), sketches(*answers)], axis=1)
    # Row 6 says what row 3 says; of row 8 the answer differs; row 9 is held out.
    assert find_near_duplicates(both, contents, groups).tolist() == [-1] * 7 + [3] + [-1] * 2
    only_prompts = find_near_duplicates(both[:, :1], contents, groups)
    assert only_prompts.tolist() == [-1] * 7 + [3, 4, -1]


def test_a_thousand_near_repeats_are_all_found() -> None:
    texts = [f"{essay(1)} number{n}" for n in range(1000)]
    twins = find_near_duplicates(sketches(*texts)[:, None], np.arange(1000, dtype=np.uint64), np.zeros(1000, int))
    assert twins[0] == -1
    assert (twins[1:] >= 0).all()
    assert (twins < np.arange(1000)).all()


# contamination ------------------------------------------------------------------------------------


def test_the_share_of_runs_of_a_held_out_prompt_that_training_texts_hold() -> None:
    held_out = HeldOut([hash_words([essay(1, 15), "short prompt"]), hash_words([essay(2, 13), essay(1, 16)])])
    assert np.nan_to_num(held_out.shares(), nan=-1).tolist() == [0, -1, 0, 0]
    held_out.mark(hash_words(["said before: " + essay(1, 14).upper() + "!", "short prompt"]))
    shares = held_out.shares().tolist()
    assert [shares[0], *shares[2:]] == [2 / 3, 0, 2 / 4]
    held_out.mark(hash_words([essay(2, 99)]))
    assert held_out.shares()[2] == 1


def test_no_held_out_prompt() -> None:
    held_out = HeldOut([])
    held_out.mark(hash_words([essay(1)]))
    assert held_out.shares().tolist() == []


# cycles -------------------------------------------------------------------------------------------


def find(*preferences: str) -> Any:
    """Cycles among preferences such as `p:ab`: to prompt p, a is preferred to b."""
    codes = [[ord(name) for name in (text[0], text[2], text[3])] for text in preferences]
    keys = np.array(codes, dtype=np.uint64).reshape(-1, 3)
    return find_cycles(keys[:, 0], keys[:, 1], keys[:, 2])


def test_a_circle_is_found_and_named() -> None:
    found = find("p:xy", "q:ab", "p:ab", "p:bc", "q:bc", "p:ca", "p:ad", "q:ac")
    assert (found.triples, found.cyclic, found.left_out) == (2, 1, 0)
    assert (found.shares > 0).tolist() == [False, False, True, True, False, True, False, False]
    assert found.example == [2, 3, 5]
    # To p, a is over b in one triple, which goes round; d was compared with a alone.
    assert np.nan_to_num(found.shares, nan=-1).tolist() == [-1, 0, 1, 1, 0, 1, -1, 0]


def test_what_is_no_circle() -> None:
    assert find("p:ab", "q:bc", "p:ca").triples == 0  # other prompts
    assert find("p:ab", "p:bc").triples == 0  # a and c were not compared
    assert find().triples == find("p:ab", "p:ba", "p:bc", "p:ca").triples == 0  # a and b are a tie
    majority = find("p:ab", "p:ba", "p:ab", "p:bc", "p:ca")
    assert (majority.triples, majority.cyclic, (majority.shares > 0).tolist()) == (
        1,
        1,
        [True, False, True, True, True],
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("abcde"), st.sampled_from("abcde")), max_size=30))
def test_circles_by_brute_force(preferences: list[tuple[str, str, str]]) -> None:
    preferences = [own for own in preferences if own[1] != own[2]]
    won = {
        (p, a, b)
        for p in "pq"
        for a, b in permutations("abcde", 2)
        if preferences.count((p, a, b)) > preferences.count((p, b, a))
    }
    triples = [(p, *three) for p in "pq" for three in combinations("abcde", 3)]
    compared = [t for t in triples if all({(t[0], a, b), (t[0], b, a)} & won for a, b in combinations(t[1:], 2))]
    circles = [
        {(p, a, b), (p, b, c), (p, c, a)}
        for p, *three in compared
        for a, b, c in permutations(three)
        if a == three[0] and {(p, a, b), (p, b, c), (p, c, a)} <= won
    ]
    found = find(*(f"{p}:{a}{b}" for p, a, b in preferences))
    assert (found.triples, found.cyclic) == (len(compared), len(circles))
    assert (found.shares > 0).tolist() == [any(own in circle for circle in circles) for own in preferences]
    assert bool(found.example) == bool(circles)
    if circles:
        assert {preferences[row] for row in found.example} in circles


def test_answers_beyond_the_bound_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycles_module, "MOST_ANSWERS", 3)
    found = find("p:ab", "p:bc", "p:cd", "p:ca", "p:de")
    assert (found.triples, found.cyclic, found.left_out) == (1, 1, 2)
    assert (found.shares > 0).tolist() == [True, True, False, True, False]


# answers ------------------------------------------------------------------------------------------


def test_an_answer_holds_a_text_whatever_its_case_and_spaces() -> None:
    prompt = make_plain("What is the capital\nof  France?")
    assert holds(make_plain("WHAT IS the capital of France? Paris."), prompt)
    assert not holds(make_plain("The capital of France is Paris."), prompt)
    assert not holds("yes, of course", "yes")  # short texts stand in others by chance
    assert last_turn([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) == "b"


def test_marks_of_style() -> None:
    text = "# Title\nSure! **Yes**!\n- one\n* two\n1. three\n```code 42```"
    found = {name: mark(text) for name, mark in STYLE.items()}
    assert found == {"characters": len(text), "exclamations": 2, "digits": 3, "lists": 3, "markup": 5, "refusal": 0}
    refusals = ["I'm sorry, but no.", "I cannot help.", "I can\u2019t do that", "As an AI, no", "抱歉，不行"]
    assert [STYLE["refusal"](text) for text in refusals] == [1] * 5
    assert STYLE["refusal"]("You can. I candidly like it; she is sorry.") == 0


def test_effects_are_means_of_differences_in_their_standard_deviations() -> None:
    assert standardise(np.array([1.0, 2.0, 3.0])).mean() == pytest.approx(2.0)  # mean 2, standard deviation 1
    assert standardise(np.array([-2.0, 2.0, 0.0, 4.0])).mean() == pytest.approx(1 / (20 / 3) ** 0.5)
    assert standardise(np.array([1.0, 1.0])).tolist() == [10, 10]
    assert standardise(np.array([0.0, 0.0])).tolist() == [0, 0]
    assert standardise(np.array([])).tolist() == []


# position -----------------------------------------------------------------------------------------


def test_the_share_of_the_answer_shown_first() -> None:
    assert judge_position(np.array([], dtype=bool)) is None
    found = judge_position(np.array([True] * 8 + [False] * 2))
    assert found
    # Wilson: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = .8, n = 10, z = 1.96
    assert (found.rows, found.share, found.low, found.high) == (
        10,
        0.8,
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )


def test_judges_of_llmbar_prefer_a_place() -> None:
    path = SHARED / "data" / "llmbar" / "judge_verdicts.jsonl.gz"
    if not path.exists():
        pytest.skip(f"LLMBar's verdicts are not at {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        verdicts = [json.loads(line) for line in file]
    first = {judge: first_wins(verdicts, judge) for judge in ("GPT-4", "ChatGPT", "Falcon")}
    gpt4, falcon = judge_position(first["GPT-4"]), judge_position(first["Falcon"])
    assert gpt4 and falcon
    assert abs(gpt4.share - 0.5) < 0.05 < falcon.low - 0.5


def first_wins(verdicts: list[Row], judge: str) -> np.ndarray:
    """One boolean per verdict: in the second order the second answer was shown first."""
    own = [verdict for verdict in verdicts if verdict["judge"] == judge]
    first = [verdict["winner_order1"] == "1" for verdict in own if verdict["winner_order1"] in ("1", "2")]
    return np.array(
        first + [verdict["winner_order2"] == "2" for verdict in own if verdict["winner_order2"] in ("1", "2")]
    )


# together -----------------------------------------------------------------------------------------


def kept(train: list[Row], test: list[Row] | None = None) -> dict[str, Rows]:
    sides = {"train": with_ids(train), "test": with_ids(test or [])}
    return {split: Rows(lambda rows=rows: iter(rows)) for split, rows in sides.items()}


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def assess_one(kind: str, train: list[Row], test: list[Row] | None = None) -> Assessment:
    return assess({kind: kept(train, test)}, None)[kind]


def test_every_mark_stands_beside_its_row() -> None:
    asked = "Which animal in the picture is the largest one?"
    train = [
        pair(essay(1), "a1", "a2!", shown_first="chosen"),
        pair(essay(1), "a2!", "a3", shown_first="rejected"),
        pair(essay(1), "a3", "a1", annotator="x", shown_first="chosen"),
        pair(essay(2), essay(5), essay(6)),
        pair(essay(2), essay(6), essay(5)),  # turned round: a contradiction, not a near duplicate
        pair(essay(2), essay(5).replace("w9 ", "x "), essay(6), shown_first="nobody knows"),
        pair(asked, "The whale.", f"{asked.upper()} The whale."),
        pair("another", essay(7), f"{essay(7)} and more"),
    ]
    test = [pair(essay(3), "b1", "b2"), pair(essay(1).replace("t1w59", "!"), "b1", "b2"), pair("short", "b1", "b2")]
    found = assess_one("preferences", train, test)
    table = found.table
    assert table["id"].tolist() == [row["id"] for row in with_ids(train + test)]
    assert table["split"].tolist() == ["train"] * 8 + ["test"] * 3
    marked = {name: np.flatnonzero(table[name].eq(True)).tolist() for name in table.columns[2:7]}
    assert marked == {
        "near_duplicates": [5],
        "contaminated": [9],
        "repeats_prompt": [6],
        "holds_other_answer": [7],
        "on_cycle": [0, 1, 2],
    }
    assert table["contaminated"].tolist() == [None] * 8 + [False, True, None]
    figures = found.figures
    ids = table["id"].tolist()
    assert figures["near_duplicates_example"] in ([ids[3], ids[5]], [ids[4], ids[5]])
    assert figures["cycles"] == {"triples": 1, "cyclic": 1, "left_out": 0, "example": ids[:3]}
    assert (figures["rows"], figures["near_duplicates"], figures["contaminated"]) == (11, 1 / 11, 1 / 2)
    assert (figures["contamination_judged"], figures["contaminated_mean"]) == (2, 1 / 2)
    assert (figures["position"]["rows"], figures["position"]["share"]) == (3, 2 / 3)
    differences = np.array([-1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    assert figures["style"]["exclamations"] == pytest.approx(differences.mean() / differences.std(ddof=1))


def test_held_out_prompts_are_sought_in_the_training_texts_of_all_kinds() -> None:
    demonstrations = [{"prompt": "p", "completion": f"He said {essay(1)}"}]
    found = assess({"sft": kept(demonstrations), "prompts": kept([{"prompt": "q"}], [{"prompt": essay(1)}])}, None)
    assert found["prompts"].figures["contaminated"] == 1
    assert found["sft"].figures["contaminated"] is None


def test_conversations_and_kinds_without_answers() -> None:
    question = [{"role": "user", "content": essay(4)}]
    answer = [{"role": "assistant", "content": f"You ask: {essay(4)}"}]
    found = assess_one("sft", [{"prompt": question, "completion": answer}])
    assert found.table["repeats_prompt"].tolist() == [True]
    assert list(assess_one("prompts", [{"prompt": question}]).table) == [
        "id",
        "split",
        "near_duplicates",
        "contaminated",
    ]
    assert assess_one("preferences", []).figures["rows"] == 0


def test_annotators_agree_on_the_two_answers_whichever_was_chosen() -> None:
    """On p1 two of three votes agree (a third of the couples), on p2 both do: two of four couples; a repeat and a pair
    with one vote count for nothing."""
    rows = [
        *(pair("p1", "a", "b", annotator=name) for name in ("x", "y", "x")),
        pair("p1", "b", "a", annotator="z"),
        *(pair("p2", "d", "c", annotator=name) for name in ("x", "y")),
        pair("p3", "e", "f", annotator="x"),
        pair("p4", "e", "f"),
        pair("p4", "e", "f"),
    ]
    agreement = assess_one("preferences", rows).figures["agreement"]
    assert (agreement["pairs"], agreement["votes"], agreement["annotators"]) == (2, 5, 3)
    assert agreement["pairwise_agreement"] == pytest.approx(2 / 4)
    assert "agreement" not in assess_one("preferences", rows[-3:]).figures


def test_a_sample_is_of_whole_prompts_and_always_the_same() -> None:
    rows = [pair(f"prompt {n % 400}", f"a{n}", f"b{n}") for n in range(1200)]
    tables = [assess({"preferences": kept(rows)}, most)["preferences"].table for most in (300, 300, 1200, None)]
    assert 200 < len(tables[0]) < 400
    assert tables[0]["id"].tolist() == tables[1]["id"].tolist()
    drawn = set(tables[0]["id"])
    prompts = [row["prompt"] for row in with_ids(rows) if row["id"] in drawn]
    assert {prompts.count(prompt) for prompt in prompts} == {3}
    assert len(tables[2]) == len(tables[3]) == 1200


CIRCLE = [pair("w1 w2", "a", "b"), pair("w1 w2", "b", "c"), pair("w1 w2", "c", "a"), pair("w7", "a!", "b")]
WARNED: list[tuple[str, list[Row], float]] = [
    ("cycles", CIRCLE, 0.9),
    ("near_duplicates", [{"prompt": f"{essay(1)} {n}"} for n in range(4)], 0.5),
    ("contaminated", [{"prompt": essay(1)}, {"prompt": essay(2)}], 0.9),
    ("repeats_prompt", [{"prompt": essay(1), "completion": essay(1)}, {"prompt": "w1", "completion": "a"}], 0.3),
    ("holds_other_answer", [pair("w1", essay(1), f"{essay(1)}."), pair("w2", "a", "b")], 0.3),
    ("position", [pair("w1", "a", "b", shown_first="chosen")], 0.4),
    ("style", CIRCLE, 0.4),
]


def judged(tmp_path: Path, rows: list[Row], **limits: Any) -> Verdict:
    kind = "sft" if "completion" in rows[0] else "preferences" if "chosen" in rows[0] else "prompts"
    test = [{"prompt": essay(1)}] if kind == "prompts" else []
    return judge_quality({kind: kept(rows, test)}, quality(**limits), open_context(tmp_path))[kind]


@pytest.mark.parametrize(("name", "rows", "below"), WARNED, ids=[name for name, *_ in WARNED])
def test_each_check_warns_or_stops_from_its_limit_on(tmp_path: Path, name: str, rows: list[Row], below: float) -> None:
    column = {"cycles": "cyclic_share", "position": "first_wins", "style": "style_exclamations"}.get(name, name)
    warned = judged(tmp_path / "warn", rows, **{name: {"warn": below, "stop": None}})
    assert (column in warned.metrics["warnings"], warned.problems) == (True, [])
    stopped = judged(tmp_path / "stop", rows, **{name: {"warn": None, "stop": below}})
    assert (stopped.metrics["warnings"], column in stopped.metrics["failed"]) == ([], True)
    assert f"validate.quality.{name}.stop {below:g}" in stopped.problems[0]
    most = judged(tmp_path / "most", rows, **{name: {"warn": 1.0, "stop": 1.0}})
    assert (most.metrics["warnings"], most.problems) == ([], [])


def test_the_stage_shows_quality_in_metrics_and_pages(workspace: Paths) -> None:
    add(workspace, "preferences", *(row | {"prompt": "w1 w2"} for row in CIRCLE[:3]))
    with pytest.raises(UserError, match=r"preferences: 100\.0% of the triples .* in a circle \(such as \w+ \w+ \w+\)"):
        check(workspace, quality=quality(cycles={"warn": 0.01, "stop": 0.1}))
    metrics = json.loads(workspace.metrics("validate").read_text(encoding="utf-8"))
    assert (metrics["success"], metrics["preferences"]["success"], metrics["sft"]["success"]) == (False, False, True)
    assert metrics["warnings"] == ["preferences: cyclic_share"]
    found = metrics["preferences"]["quality"]
    assert (found["rows"], found["cycles"]["cyclic"], found["on_cycle"]) == (19, 1, pytest.approx(3 / 19, abs=1e-5))
    pages = [page.read_text("utf-8") for page in workspace.report("validate").rglob("*.html")]
    assert any(all(name in page for name in found["cycles"]["example"]) for page in pages)
