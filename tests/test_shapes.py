"""Shapes: rows as the originals write them become canonical, nothing is lost silently, and the shape is found."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from rlhf.data.files import read_file
from rlhf.data.formats import Row
from rlhf.data.shapes import SHAPES, forms
from rlhf.data.shapes.guessing import guess_shapes
from rlhf.data.shapes.table import FORMS
from rlhf.data.sources import REQUIRED, load_source, whole_file
from rlhf.errors import UserError
from rlhf.params import DataParams, ShapeName, kind_of_shape
from tests.conftest import SHARED


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    """Sentences that another test has seen are said again."""
    forms.tell.cache_clear()


NEEDED = {**REQUIRED, "ratings": (*REQUIRED["ratings"], "score")}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def convert(shape: str, *rows: Row) -> list[Row]:
    return list(SHAPES[shape](iter(rows), None, "rows.jsonl"))


def rated(text: str, *ratings: str) -> dict[str, Any]:
    """An answer as UltraFeedback holds it, with one rating per aspect."""
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    annotations = {name: {"Rating": rating, "Rationale": "…"} for name, rating in zip(aspects, ratings, strict=True)}
    return {"model": f"model of {text}", "response": text, "annotations": annotations, "overall_score": 7.0}


HELPSTEER = {
    "prompt": "c#",
    "response": "A language.",
    "helpfulness": 3,
    "correctness": 4,
    "coherence": 4,
    "complexity": 2,
    "verbosity": 0,
}
HELPSTEER2 = {
    "split": "train",
    "prompt": "one?\n<extra_id_1>Assistant\ntwo\n<extra_id_1>User\nthree?",
    "response_1": "a",
    "response_2": "b",
    "preference_strength": -2,
    "preference_statement": "@Response 1 is better",
}
HELPSTEER3 = {
    "domain": "code",
    "language": "python",
    "context": [user("one?")],
    "response1": "a",
    "response2": "b",
    "overall_preference": 3,
    "individual_preference": [{"score": 3, "reasoning": "r", "feedback1": "f", "feedback2": "g"}],
}
ULTRAFEEDBACK = {
    "source": "flan",
    "instruction": "Say.",
    "models": ["m", "n"],
    "completions": [rated("bad", "1", "2", "1", "N/A"), rated("good", "5", "5", "4", "5")],
    "correct_answers": ["None"],
}
BINARIZED = {
    "prompt": "Say.",
    "prompt_id": "77",
    "chosen": [user("Say."), bot("good")],
    "rejected": [user("Say."), bot("bad")],
    "messages": [user("Say."), bot("good")],
    "score_chosen": 8.5,
    "score_rejected": 6.0,
}
SHP = {
    "post_id": "qt3nxl",
    "domain": "askculinary_train",
    "history": "How?",
    "human_ref_A": "a",
    "human_ref_B": "b",
    "labels": 0,
    "score_A": 10,
    "score_B": 20,
    "score_ratio": 2.0,
}
PKU = {
    "prompt": "How?",
    "response_0": "mild",
    "response_1": "harmful",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "response_0_severity_level": 0,
    "response_1_severity_level": 3,
    "better_response_id": 1,
    "safer_response_id": 0,
    "prompt_source": "x",
}
ARENA = {
    "question_id": 81,
    "model_a": "m",
    "model_b": "n",
    "winner": "model_b",
    "judge": "expert_7",
    "conversation_a": [user("one?"), bot("a"), user("two?"), bot("c")],
    "conversation_b": [user("one?"), bot("b"), user("two?"), bot("d")],
    "turn": 1,
}
ALPACA_FARM = {
    "instruction": "Do.",
    "output_1": "a",
    "output_2": "b",
    "preference": 2,
    "annotator_index": 15,
    "dataset": "koala",
}
LLMBAR = {"input": "Do.", "output_1": "a", "output_2": "b", "label": 1}
SUMMARY = {
    "info": {"id": "t3_1", "post": "Long. ", "title": "T", "subreddit": "s", "site": None, "article": None},
    "summaries": [{"text": " a", "policy": "p", "note": None}, {"text": " b", "policy": "q", "note": None}],
    "choice": 1,
    "worker": "w9",
    "batch": "batch3",
}
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant: because",
    "rejected": "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant: no",
}
CONVERSATION = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}, {"from": "human", "value": "why"}]
SHAREGPT = {"conversations": [*CONVERSATION, {"from": "gpt", "value": "so"}], "system": "Be kind.", "tools": ""}
SHAREGPT_PAIR = {
    "conversations": CONVERSATION,
    "chosen": {"from": "gpt", "value": "so"},
    "rejected": {"from": "gpt", "value": "no"},
}
MESSAGES = {"messages": [system("Be kind."), user("hi"), bot("so")]}
MESSAGES_PAIR = {"chosen": [user("hi"), bot("so")], "rejected": [user("hi"), bot("no")], "chosen_rating": 5}
ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
SEED = {
    "id": "seed_task_0",
    "name": "n",
    "instruction": "Pair?",
    "instances": [{"input": "", "output": "a"}, {"input": "x", "output": "b"}],
    "is_classification": False,
}
REVIEW = {"text": "I went and saw this movie last night\nafter being told so.", "label": 1}
GSM8K = {"question": "How many?", "answer": "She has 2*600=<<2*600=1200>>1200.\n#### 1,200"}
DAPO = {
    "data_source": "math_dapo",
    "prompt": [user("Solve it.")],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a"},
}
MATHS = {"problem": "Find x.", "solution": r"First \boxed{0}, then \boxed{\frac{1}{2}}.", "level": "Level 2"}
OPEN_R1 = {**MATHS, "answer": "1/2"}
ASDIV = {"body": "Ann has 9.", "question": "How many?", "answer": "9 (apples)", "formula": "9=9"}
SVAMP = {"Body": "Ann has 9", "Question": "How many?", "Answer": 9.0, "Equation": "( 9.0 )", "ID": "chal-1"}
SQL = {
    "question": "How many heads?",
    "context": "CREATE TABLE head (age INTEGER)",
    "answer": "SELECT COUNT(*) FROM head",
}
TEXT2SQL = {
    "query-split": "train",
    "sentences": [
        {
            "question-split": "dev",
            "text": "cities in state_name0 ?",
            "variables": {"state_name0": "texas", "name0": ""},
        },
        {"question-split": "test", "text": "towns of state_name0", "variables": {"state_name0": "ohio"}},
    ],
    "sql": ['SELECT a FROM name0 WHERE s = "state_name0" ;', "SELECT b"],
    "variables": [{"name": "state_name0", "example": "maine"}, {"name": "name0", "example": "city"}],
}

HH_PROMPT = [user("hi"), bot("yes?"), user("why")]
CASES: list[tuple[str, Row, list[Row]]] = [
    (
        "helpsteer_ratings",
        HELPSTEER,
        [{"prompt": [user("c#")], "completion": [bot("A language.")], "score": pytest.approx(11 / 3)}],
    ),
    ("helpsteer_prompts", HELPSTEER, [{"prompt": [user("c#")]}]),
    (
        "helpsteer2_preferences",
        HELPSTEER2,
        [
            {
                "prompt": [user("one?"), bot("two"), user("three?")],
                "chosen": [bot("a")],
                "rejected": [bot("b")],
                "margin": 2,
            }
        ],
    ),
    (
        "helpsteer3_preferences",
        HELPSTEER3,
        [{"prompt": [user("one?")], "chosen": [bot("b")], "rejected": [bot("a")], "margin": 3, "domain": "code"}],
    ),
    ("helpsteer3_prompts", HELPSTEER3, [{"prompt": [user("one?")], "language": "python"}]),
    (
        "ultrafeedback_preferences",
        ULTRAFEEDBACK,
        [
            {
                "prompt": [user("Say.")],
                "chosen": [bot("good")],
                "rejected": [bot("bad")],
                "margin": pytest.approx(4.75 - 4 / 3),
            }
        ],
    ),
    (
        "ultrafeedback_ratings",
        ULTRAFEEDBACK,
        [
            {"prompt": [user("Say.")], "completion": [bot("bad")], "score": pytest.approx(4 / 3), "source": "flan"},
            {"prompt": [user("Say.")], "completion": [bot("good")], "score": 4.75, "model": "model of good"},
        ],
    ),
    ("ultrafeedback_prompts", ULTRAFEEDBACK, [{"prompt": [user("Say.")]}]),
    (
        "ultrafeedback_binarized_preferences",
        BINARIZED,
        [
            {
                "prompt": [user("Say.")],
                "chosen": [bot("good")],
                "rejected": [bot("bad")],
                "margin": 2.5,
                "prompt_id": "77",
            }
        ],
    ),
    ("ultrafeedback_binarized_sft", BINARIZED, [{"prompt": [user("Say.")], "completion": [bot("good")]}]),
    ("ultrafeedback_binarized_prompts", BINARIZED, [{"prompt": [user("Say.")]}]),
    (
        "shp_preferences",
        SHP,
        [
            {
                "prompt": [user("How?")],
                "chosen": [bot("b")],
                "rejected": [bot("a")],
                "margin": math.log(2),
                "score_A": 10,
            }
        ],
    ),
    ("shp_prompts", SHP, [{"prompt": [user("How?")]}]),
    (
        "pku_helpful_preferences",
        PKU,
        [{"prompt": [user("How?")], "chosen": [bot("harmful")], "rejected": [bot("mild")], "prompt_source": "x"}],
    ),
    (
        "pku_safe_preferences",
        PKU,
        [{"prompt": [user("How?")], "chosen": [bot("mild")], "rejected": [bot("harmful")]}],
    ),
    (
        "pku_severity_ratings",
        PKU,
        [
            {"prompt": [user("How?")], "completion": [bot("mild")], "score": 0.0, "is_safe": True},
            {"prompt": [user("How?")], "completion": [bot("harmful")], "score": -3.0, "is_safe": False},
        ],
    ),
    ("pku_prompts", PKU, [{"prompt": [user("How?")]}]),
    (
        "arena_preferences",
        ARENA,
        [{"prompt": [user("one?")], "chosen": [bot("b")], "rejected": [bot("a")], "annotator": "expert_7", "turn": 1}],
    ),
    (
        "alpaca_farm_preferences",
        ALPACA_FARM,
        [{"prompt": [user("Do.")], "chosen": [bot("b")], "rejected": [bot("a")], "annotator": 15, "dataset": "koala"}],
    ),
    ("llmbar_preferences", LLMBAR, [{"prompt": [user("Do.")], "chosen": [bot("a")], "rejected": [bot("b")]}]),
    (
        "summary_preferences",
        SUMMARY,
        [
            {
                "prompt": [user("Summarise this text.\n\nLong.")],
                "chosen": [bot(" b")],
                "rejected": [bot(" a")],
                "annotator": "w9",
            }
        ],
    ),
    ("summary_prompts", SUMMARY, [{"prompt": [user("Summarise this text.\n\nLong.")], "batch": "batch3"}]),
    ("hh_preferences", HH, [{"prompt": HH_PROMPT, "chosen": [bot("because")], "rejected": [bot("no")]}]),
    ("hh_sft", HH, [{"prompt": HH_PROMPT, "completion": [bot("because")]}]),
    ("hh_prompts", HH, [{"prompt": HH_PROMPT}]),
    (
        "sharegpt_preferences",
        SHAREGPT_PAIR,
        [{"prompt": HH_PROMPT, "chosen": [bot("so")], "rejected": [bot("no")]}],
    ),
    (
        "sharegpt_ratings",
        {**SHAREGPT, "kto_tag": False},
        [{"prompt": [system("Be kind."), *HH_PROMPT], "completion": [bot("so")], "score": 0.0}],
    ),
    ("sharegpt_sft", SHAREGPT, [{"prompt": [system("Be kind."), *HH_PROMPT], "completion": [bot("so")], "tools": ""}]),
    ("sharegpt_prompts", SHAREGPT, [{"prompt": [system("Be kind."), *HH_PROMPT]}]),
    (
        "messages_preferences",
        MESSAGES_PAIR,
        [{"prompt": [user("hi")], "chosen": [bot("so")], "rejected": [bot("no")], "chosen_rating": 5}],
    ),
    (
        "messages_ratings",
        {**MESSAGES, "label": True},
        [{"prompt": [system("Be kind."), user("hi")], "completion": [bot("so")], "score": 1.0}],
    ),
    ("messages_sft", MESSAGES, [{"prompt": [system("Be kind."), user("hi")], "completion": [bot("so")]}]),
    ("messages_prompts", MESSAGES, [{"prompt": [system("Be kind."), user("hi")]}]),
    (
        "alpaca_preferences",
        {"instruction": "Add.", "input": "", "chosen": "2", "rejected": "3"},
        [{"prompt": [user("Add.")], "chosen": [bot("2")], "rejected": [bot("3")]}],
    ),
    (
        "alpaca_ratings",
        {**ALPACA, "kto_tag": True},
        [{"prompt": [user("Add.\n1 + 1")], "completion": [bot("2")], "score": 1.0}],
    ),
    (
        "alpaca_sft",
        {**ALPACA, "system": "Be kind.", "history": [["hi", "yes?"]]},
        [{"prompt": [system("Be kind."), user("hi"), bot("yes?"), user("Add.\n1 + 1")], "completion": [bot("2")]}],
    ),
    ("alpaca_prompts", ALPACA, [{"prompt": [user("Add.\n1 + 1")]}]),
    (
        "self_instruct_sft",
        SEED,
        [
            {"prompt": [user("Pair?")], "completion": [bot("a")], "id": "seed_task_0"},
            {"prompt": [user("Pair?\nx")], "completion": [bot("b")], "id": "seed_task_0"},
        ],
    ),
    ("self_instruct_prompts", SEED, [{"prompt": [user("Pair?")]}, {"prompt": [user("Pair?\nx")]}]),
    (
        "kto_ratings",
        {"prompt": "hi", "completion": "so", "label": False},
        [{"prompt": [user("hi")], "completion": [bot("so")], "score": 0.0}],
    ),
    (
        "imdb_ratings",
        REVIEW,
        [{"prompt": "I went and saw this movie last night", "completion": "\nafter being told so.", "score": 1.0}],
    ),
    ("imdb_sft", REVIEW, [{"prompt": "I went and saw this movie last night", "completion": "\nafter being told so."}]),
    ("imdb_prompts", REVIEW, [{"prompt": "I went and saw this movie last night"}]),
    ("gsm8k_sft", GSM8K, [{"prompt": [user("How many?")], "completion": [bot("She has 2*600=1200.\n#### 1,200")]}]),
    ("gsm8k_prompts", GSM8K, [{"prompt": [user("How many?")], "answer": "1200"}]),
    ("dapo_prompts", DAPO, [{"prompt": [user("Solve it.")], "answer": "34", "ability": "MATH"}]),
    ("maths_sft", OPEN_R1, [{"prompt": [user("Find x.")], "completion": [bot(MATHS["solution"])], "answer": "1/2"}]),
    ("maths_prompts", MATHS, [{"prompt": [user("Find x.")], "answer": r"\frac{1}{2}", "level": "Level 2"}]),
    ("asdiv_prompts", ASDIV, [{"prompt": [user("Ann has 9. How many?")], "answer": "9", "formula": "9=9"}]),
    ("asdiv_sft", ASDIV, [{"prompt": [user("Ann has 9. How many?")], "completion": [bot("9=9\n#### 9")]}]),
    (
        "svamp_sft",
        SVAMP,
        [{"prompt": [user("Ann has 9 How many?")], "completion": [bot("( 9.0 )\n#### 9")], "ID": "chal-1"}],
    ),
    (
        "svamp_prompts",
        SVAMP,
        [{"prompt": [user("Ann has 9 How many?")], "answer": "9", "Equation": "( 9.0 )", "ID": "chal-1"}],
    ),
    (
        "sql_context_sft",
        SQL,
        [
            {
                "prompt": [user("CREATE TABLE head (age INTEGER)\n\nWrite one SQL query: How many heads?")],
                "completion": [bot("SELECT COUNT(*) FROM head")],
            }
        ],
    ),
    (
        "sql_context_prompts",
        SQL,
        [
            {
                "prompt": [user("CREATE TABLE head (age INTEGER)\n\nWrite one SQL query: How many heads?")],
                "answer": "SELECT COUNT(*) FROM head",
                "context": "CREATE TABLE head (age INTEGER)",
            }
        ],
    ),
    (
        "text2sql_sft",
        TEXT2SQL,
        [
            {
                "prompt": [user("cities in texas ?")],
                "completion": [bot('SELECT a FROM city WHERE s = "texas" ;')],
                "question_split": "dev",
            },
            {"prompt": [user("towns of ohio")], "completion": [bot('SELECT a FROM city WHERE s = "ohio" ;')]},
        ],
    ),
    (
        "text2sql_prompts",
        TEXT2SQL,
        [
            {"prompt": [user("cities in texas ?")], "answer": 'SELECT a FROM city WHERE s = "texas" ;'},
            {
                "prompt": [user("towns of ohio")],
                "answer": 'SELECT a FROM city WHERE s = "ohio" ;',
                "query-split": "train",
            },
        ],
    ),
]


def test_every_shape_has_a_name_in_params_and_a_case() -> None:
    assert sorted(SHAPES) == sorted(get_args(ShapeName))
    assert [shape for shape, _, _ in CASES if shape not in FORMS] == []
    assert sorted(FORMS) == sorted(shape for shape, _, _ in CASES)
    assert all(kind_of_shape(shape) in REQUIRED for shape in SHAPES if shape != "canonical")


@pytest.mark.parametrize(("shape", "row", "expected"), CASES, ids=[case[0] for case in CASES])
def test_original_rows_become_canonical(shape: str, row: Row, expected: list[Row]) -> None:
    made = convert(shape, row)
    assert [{name: one.get(name) for name in wanted} for one, wanted in zip(made, expected, strict=True)] == expected
    spent = set(FORMS[shape].columns) - set(expected[0])
    assert not spent & set(made[0]), "what the shape has read is gone"
    untouched = set(row) - {*FORMS[shape].columns, *FORMS[shape].optional}
    assert untouched <= set(made[0]), "what it has not is kept"


@pytest.mark.parametrize(("shape", "row", "_expected"), CASES, ids=[case[0] for case in CASES])
def test_the_shape_of_a_row_is_found(shape: str, row: Row, _expected: list[Row]) -> None:
    kind = kind_of_shape(shape)
    found = [guess.shape for guess in guess_shapes([row]) if guess.kind == kind]
    others = {"pku_helpful_preferences": 1, "pku_safe_preferences": 1}
    assert shape in found[: 1 + others.get(shape, 0)]


@pytest.mark.parametrize(("shape", "row", "_expected"), CASES, ids=[case[0] for case in CASES])
def test_a_broken_value_is_passed_on_and_never_lost(shape: str, row: Row, _expected: list[Row]) -> None:
    needed = NEEDED[str(kind_of_shape(shape))]
    whole = len(convert(shape, row))
    for column in FORMS[shape].columns:
        for value in (None, 7.5, [], {}, [None], [{}], "", {"a": 1}):
            made = convert(shape, row, row | {column: value})
            assert len(made) > whole or FORMS[shape].is_distinct, f"{column}: {value!r} lost a row"
            for one in made if value is None else []:
                if any(one[name] is None for name in needed):
                    assert column in one or f"source_{column}" in one, "the quarantine shows what there was"


@pytest.mark.parametrize(
    ("shape", "row", "lost"),
    [
        ("helpsteer_ratings", HELPSTEER | {"response": None}, "completion"),
        ("helpsteer2_preferences", HELPSTEER2 | {"preference_strength": None}, "chosen"),
        ("ultrafeedback_ratings", ULTRAFEEDBACK | {"completions": []}, "completion"),
        ("ultrafeedback_preferences", ULTRAFEEDBACK | {"completions": [rated("one", "1", "1", "1", "1")]}, "chosen"),
        ("ultrafeedback_binarized_preferences", BINARIZED | {"score_chosen": None}, "chosen"),
        ("pku_severity_ratings", PKU | {"response_0_severity_level": None}, "score"),
        ("arena_preferences", ARENA | {"winner": "model_c"}, "chosen"),
        ("hh_preferences", HH | {"chosen": "Human: no empty line before"}, "prompt"),
        ("hh_preferences", HH | {"rejected": "\n\nHuman: another start\n\nAssistant: x"}, "prompt"),
        ("hh_sft", HH | {"chosen": "\n\nHuman: the last word"}, "completion"),
        ("sharegpt_sft", {"conversations": [{"from": "alien", "value": "x"}]}, "prompt"),
        ("sharegpt_sft", {"conversations": CONVERSATION}, "completion"),
        ("gsm8k_prompts", GSM8K | {"answer": "no mark"}, "answer"),
        ("dapo_prompts", DAPO | {"reward_model": {}}, "answer"),
        ("maths_prompts", MATHS | {"solution": r"\boxed{never closed"}, "answer"),
        ("imdb_sft", {"text": "too short", "label": 1}, "prompt"),
    ],
)
def test_a_value_that_cannot_be_used_is_null(shape: str, row: Row, lost: str) -> None:
    made = convert(shape, row)
    assert made[0][lost] is None
    kept = {f"source_{name}": value for name, value in row.items() if name in made[0]} | row
    assert all(made[0].get(name, made[0].get(f"source_{name}")) == kept[name] for name in row if name not in made[0])


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("helpsteer2_preferences", HELPSTEER2 | {"preference_strength": 0}),
        ("helpsteer3_preferences", HELPSTEER3 | {"overall_preference": 0}),
        ("ultrafeedback_binarized_preferences", BINARIZED | {"score_rejected": 8.5}),
        (
            "ultrafeedback_preferences",
            ULTRAFEEDBACK | {"completions": [rated("a", "2", "2", "2", "2"), rated("b", "2", "N/A", "2", "2")]},
        ),
        ("arena_preferences", ARENA | {"winner": "tie (bothbad)"}),
        ("alpaca_farm_preferences", ALPACA_FARM | {"preference": 0}),
    ],
)
def test_ties_are_left_out_and_counted(shape: str, row: Row, caplog: pytest.LogCaptureFixture) -> None:
    whole = next(case[1] for case in CASES if case[0] == shape)
    with caplog.at_level(logging.INFO):
        assert len(convert(shape, row, whole, row)) == 1
        assert len(convert(shape, row, whole, row)) == 1
    assert caplog.text.count("rows.jsonl: 3 rows, 2 without a preference") == 1


def test_signs() -> None:
    """Below 0 the first answer is better in both HelpSteers; label 1 of SHP is comment A; severity is bad."""
    assert convert("helpsteer2_preferences", HELPSTEER2 | {"preference_strength": 1})[0]["chosen"] == [bot("b")]
    assert convert("helpsteer3_preferences", HELPSTEER3 | {"overall_preference": -1})[0]["chosen"] == [bot("a")]
    assert convert("shp_preferences", SHP | {"labels": 1})[0]["chosen"] == [bot("a")]
    assert convert("llmbar_preferences", LLMBAR | {"label": 2})[0]["chosen"] == [bot("b")]
    assert convert("summary_preferences", SUMMARY | {"choice": 0})[0]["chosen"] == [bot(" a")]
    mild, harmful = convert("pku_severity_ratings", PKU)
    assert mild["score"] > harmful["score"]


def test_a_rating_may_be_chosen_by_its_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(HELPSTEER) + "\n", encoding="utf-8")
    source = whole_file(tmp_path / "a.jsonl", "helpsteer_ratings", {"score": "correctness"})
    (row,) = load_source(source, "ratings", tmp_path)
    assert row["score"] == 4


def test_conversations_that_part_early_keep_all_that_follows() -> None:
    row = {
        "chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: so\n\nAssistant: b",
        "rejected": "\n\nHuman: hi\n\nAssistant: c",
    }
    (made,) = convert("hh_preferences", row)
    assert (made["prompt"], made["chosen"]) == ([user("hi")], [bot("a"), user("so"), bot("b")])
    assert made["rejected"] == [bot("c")]
    same = convert("hh_preferences", {"chosen": HH["chosen"], "rejected": HH["chosen"]})
    assert same[0]["chosen"] == same[0]["rejected"] == [bot("because")]


def test_whole_conversations_are_judged_after_the_second_turn() -> None:
    (made,) = convert("arena_preferences", ARENA | {"turn": 2, "winner": "model_a"})
    assert made["chosen"] == [bot("a"), user("two?"), bot("c")]


def test_prompts_stand_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        made = convert("hh_prompts", HH, HH, HH | {"chosen": "broken"}, HH | {"chosen": "broken"})
    assert [row["prompt"] for row in made] == [HH_PROMPT, None, None]
    assert "1 prompts seen before" in caplog.text


def test_columns_that_a_canonical_name_would_hide_move_aside() -> None:
    (made,) = convert("shp_preferences", SHP | {"margin": "theirs", "chosen": "theirs"})
    assert (made["source_margin"], made["source_chosen"]) == ("theirs", "theirs")


@pytest.mark.parametrize(
    ("shape", "rows", "message"),
    [
        (
            "hh_preferences",
            [ALPACA],
            r"rows.jsonl has not the shape hh_preferences: no column 'chosen', 'rejected' "
            r"\(found: instruction, input, output\); it looks like alpaca_sft \(sft\): "
            r"set prepare.data.sft.shape to that",
        ),
        (
            "alpaca_sft",
            [{"question": "q", "reply": "a"}],
            r"no column 'instruction', 'output' \(found: question, reply\); it looks like canonical \(sft\): "
            r'set prepare.data.sft.shape to that and its columns to {"prompt": "question", "completion": "reply"}',
        ),
        (
            "gsm8k_prompts",
            [{"quest": "q", "zzz": 1}],
            r"no column 'question', 'answer' .* name one in prepare.data.prompts.columns, such as {question: quest}",
        ),
        ("gsm8k_sft", [GSM8K] * 150 + [ALPACA], r"rows.jsonl, its row 151 has not the shape gsm8k_sft"),
    ],
)
def test_another_shape_is_refused_with_the_one_that_fits(shape: str, rows: list[Row], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        convert(shape, *rows)
    assert "\n" not in str(caught.value)


def test_rows_stream() -> None:
    def endless() -> Iterator[Row]:
        for number in itertools.count():
            yield {**GSM8K, "question": str(number)}

    made = SHAPES["gsm8k_prompts"](endless(), None, "endless")
    assert [row["prompt"][0]["content"] for row in itertools.islice(made, 300)] == [str(n) for n in range(300)]
    assert next(SHAPES["canonical"](endless(), None, "endless"))["question"] == "0"


def test_params_refuse_a_shape_of_another_kind() -> None:
    source = {"kind": "file", "path": "a", "columns": {}, "test_share": 0.1, "limit": None}
    world = {"kind": "world"}
    values = {"sft": {**source, "shape": "hh_preferences"}, "preferences": None, "ratings": None, "prompts": world}
    values |= {"votes": "keep", "system": None, "form": None}
    with pytest.raises(ValueError, match=r"sft.shape is hh_preferences, which gives preferences; did you mean hh_sft"):
        DataParams(**values)
    values |= {"sft": {**source, "shape": "argument_texts"}, "prompts": {**source, "shape": "argument_prompts"}}
    DataParams(**values | {"form": "{solution}{answer}"})
    with pytest.raises(ValueError, match=r"form has no {answer}; write it where"):
        DataParams(**values | {"form": "{solution} {Answer}"})


@pytest.mark.parametrize(
    ("rows", "kind", "columns"),
    [
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], "preferences", {}),
        ([{"question": "q", "better": "a", "worse": "b"}], "preferences", {
            "prompt": "question", "chosen": "better", "rejected": "worse"
        }),
        ([{"query": "q", "response": "a", "stars": 4}], "ratings", {
            "prompt": "query", "completion": "response", "score": "stars"
        }),
        ([{"prompt": None}, {"prompt": [user("p")], "answer": 1}], "prompts", {}),
    ],
)  # fmt: skip
def test_canonical_rows_are_found_under_other_names(rows: list[Row], kind: str, columns: dict[str, str]) -> None:
    guess = guess_shapes(rows)[0]
    assert (guess.shape, guess.kind, dict(guess.columns)) == ("canonical", kind, columns)


def test_nothing_fits() -> None:
    assert guess_shapes([{"a": 1, "b": None}]) == []
    assert guess_shapes([]) == []


# the originals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("hh-rlhf/harmless-base-test.jsonl.gz", "hh_preferences", 2312),
        ("llamafactory/dpo_en_demo.json", "sharegpt_preferences", 300),
        ("llamafactory/kto_en_demo.json", "messages_ratings", 300),
        ("llamafactory/alpaca_en_demo.json", "alpaca_sft", 999),
        ("gsm8k/test.jsonl", "gsm8k_sft", 1319),
        ("math/svamp.jsonl", "svamp_prompts", 1000),
        ("math/svamp.jsonl", "svamp_sft", 1000),
        ("math/asdiv.jsonl", "asdiv_sft", 2215),
        ("math/asdiv.jsonl", "asdiv_prompts", 2215),
        ("text2sql/geography.json", "text2sql_sft", 877),
        ("text2sql/restaurants.json", "text2sql_sft", 378),
        ("self_instruct/seed_tasks.jsonl", "self_instruct_sft", 175),
        ("llmbar/Dataset/LLMBar/Natural/dataset.json", "llmbar_preferences", 100),
        ("ukpconvarg1/pairs_5annotators.jsonl.gz", "argument_votes", 55255),
    ],
)
def test_real_files(name: str, shape: str, count: int) -> None:
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"the real data are not at {path}")
    rows = read_file(path, name).rows
    assert shape in [guess.shape for guess in guess_shapes(rows[:100])]
    made = list(SHAPES[shape](rows, path, name))
    needed = NEEDED[str(kind_of_shape(shape))]
    assert len(made) == count
    assert not any(row[name] is None for row in made for name in needed)
