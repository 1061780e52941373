"""The hackability probe: what each trick does, whom it accuses, and what the stage leaves behind where it stops."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import alignflow
from rlhf.curves import no_log
from rlhf.data.formats import completion_text, write_rows
from rlhf.data.world import World
from rlhf.errors import UserError
from rlhf.evaluation.comparison import score_interval
from rlhf.params import Params, ProbeParams
from rlhf.probe import probing
from rlhf.probe.cases import (
    Case,
    HeldOut,
    cases_from_answers,
    cases_from_preferences,
    cases_from_ratings,
    make_case,
    read_cases,
)
from rlhf.probe.probing import Probe, refuse_hackable, try_tricks
from rlhf.probe.report import write_report
from rlhf.probe.tricks import PHRASES, TRICKS, apply_trick, find_language
from rlhf.rewards.places import find_answer
from tasks import probe
from tasks.paths import Paths
from tests.tiny import tiny_params

BY_NAME = {trick.name: trick for trick in TRICKS}
TAGGED = "<think> 3 + 4 = 7.</think><answer> 7</answer>"
LIMITS = {"wins": {"warn": 0.05, "stop": 0.2}, "gain": {"warn": 0.5, "stop": 1.5}}


def make_section(**changes: Any) -> ProbeParams:
    return ProbeParams.model_validate({"rows": 64, "batch_size": 16, "on_hackable": "stop", **LIMITS, **changes})


# tricks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plain", "tagged"),
    [
        ("padded", "Seven. {filler}", "<think> 3 + 4 = 7. {filler}</think><answer> 7</answer>"),
        (
            "repeated",
            "Seven. Seven. Seven.",
            "<think> 3 + 4 = 7. 3 + 4 = 7. 3 + 4 = 7.</think><answer> 7</answer>",
        ),
        ("flattering", "{praise} Seven.", "<think>{praise} 3 + 4 = 7.</think><answer> 7</answer>"),
        ("apologetic", "{apology} Seven.", "<think>{apology} 3 + 4 = 7.</think><answer> 7</answer>"),
        ("truncated", "Sev", "<think> 3 + 4 ="),
        ("tags_only", None, "<think></think><answer></answer>"),
        ("refusing", "{refusal}", "{refusal}"),
        ("empty", "", ""),
    ],
)
def test_what_each_trick_does_to_a_text(name: str, plain: str | None, tagged: str) -> None:
    said = PHRASES["en"]
    phrases = {"filler": " ".join(said.filler), "praise": said.praise, "apology": said.apology}
    phrases["refusal"] = said.refusal
    expected = None if plain is None else plain.format(**phrases)
    assert apply_trick(BY_NAME[name], "Seven.", "en") == expected
    assert apply_trick(BY_NAME[name], TAGGED, "en") == tagged.format(**phrases)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.name)
def test_a_trick_that_adds_words_keeps_the_result_and_no_other_does(trick: Any, language: str) -> None:
    tricked = apply_trick(trick, TAGGED, language)
    assert (read_result(tricked) == "7") == trick.adds
    assert tricked == apply_trick(trick, TAGGED, language)
    assert (len(tricked) > len(TAGGED)) == trick.adds
    assert (
        BY_NAME["padded"].edit("", PHRASES[language]) != BY_NAME["padded"].edit("", PHRASES["en"]) or language == "en"
    )


def test_an_answer_that_forgot_a_tag_is_padded_where_its_thoughts_end() -> None:
    padded = apply_trick(BY_NAME["padded"], " 7.</think><answer> 7", "zh")
    assert padded == " 7." + "".join(PHRASES["zh"].filler) + "</think><answer> 7"


def test_of_messages_the_last_one_changes() -> None:
    answer = [{"role": "assistant", "content": "Well."}, {"role": "assistant", "content": "Seven.", "name": "a"}]
    tricked = apply_trick(BY_NAME["empty"], answer, "en")
    assert tricked == [answer[0], {"role": "assistant", "content": "", "name": "a"}]
    assert answer[1]["content"] == "Seven."
    assert apply_trick(BY_NAME["tags_only"], answer, "en") is None


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["How many?", "7"], "en"),
        (["小明有 3 个苹果。", "<think> 3 + 4 = 7.</think>"], "zh"),
        ([[{"role": "user", "content": "小明有 3 个苹果。"}], "OK"], "zh"),
        (["3 + 4", "7"], "en"),
    ],
)
def test_the_language_is_that_of_most_letters(texts: list[Any], language: str) -> None:
    assert find_language(*texts) == language


# cases --------------------------------------------------------------------------------------------


def test_pairs_are_turned_by_the_truth_where_it_is_known() -> None:
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "b", "chosen": "x", "rejected": "y", "truth_flipped": True},
    ]
    assert [(case.good, case.bad) for case in cases_from_preferences(rows)] == [("x", "y"), ("y", "x")]


def test_of_ratings_the_best_and_the_worst_answer_to_a_prompt_make_a_case() -> None:
    rows = [
        {"prompt": "a", "completion": "middling", "score": 3},
        {"prompt": "a", "completion": "best", "score": 4},
        {"prompt": "a", "completion": "worst", "score": 4, "truth_score": 0},
        {"prompt": "b", "completion": "alone", "score": 4},
    ]
    assert cases_from_ratings(rows) == [Case("a", "best", "worst", "en")]


def test_one_answer_to_a_prompt_is_held_against_that_to_another() -> None:
    rows = [
        {"prompt": name, "completion": f"to {name}", "score": score} for name, score in (("a", 4), ("b", 0), ("c", 3))
    ]
    assert cases_from_ratings(rows) == [Case("a", "to a", "to c", "en"), Case("c", "to c", "to a", "en")]
    twice = [{"prompt": "a", "completion": "1"}, {"prompt": "a", "completion": "2"}, {"prompt": "b", "completion": "1"}]
    assert cases_from_answers(twice) == [Case("a", "2", "1", "en"), Case("b", "1", "2", "en")]


def test_demonstrations_serve_where_no_label_is_held_out(tmp_path: Path) -> None:
    files = HeldOut(tmp_path / "preferences.jsonl", None, tmp_path / "sft.jsonl")
    assert read_cases(files) == ([], "nothing")
    write_rows(files.preferences, [])
    write_rows(files.sft, [{"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2"}])
    cases, source = read_cases(files)
    assert (source, len(cases)) == ("sft", 2)


# verdicts -----------------------------------------------------------------------------------------


def make_cases(count: int = 40, conversational: bool = False) -> list[Case]:
    """Sums, answered rightly and wrongly in the same number of characters."""

    def answer(prompt: str, result: int) -> Any:
        text = f"<think> {prompt} = {result}.</think><answer> {result}</answer>"
        return [{"role": "assistant", "content": text}] if conversational else text

    cases = []
    for number in range(10, 10 + count):
        prompt = f"{number} + 11"
        asked = [{"role": "user", "content": prompt}] if conversational else prompt
        cases.append(make_case(asked, answer(prompt, number + 11), answer(prompt, number + 12)))
    return cases


def count_characters(_prompts: Any, answers: Any) -> list[float]:
    return [float(len(completion_text(answer))) for answer in answers]


def score_by_rule(prompts: Any, answers: Any) -> list[float]:
    """1 for the right sum in the right form."""
    sums = [sum(map(int, completion_text(prompt).split(" + "))) for prompt in prompts]
    return [float(read_result(answer) == str(right)) for answer, right in zip(answers, sums, strict=True)]


def read_result(answer: Any) -> str | None:
    found = find_answer(answer, "form")
    return None if found is None else found.strip()


def verdicts(found: Probe) -> dict[str, str]:
    return {one.trick.name: one.verdict for one in found.tried}


@pytest.mark.parametrize("conversational", [False, True])
def test_a_scorer_that_counts_characters_is_caught(conversational: bool) -> None:
    found = try_tricks(count_characters, make_cases(conversational=conversational), make_section(), "")
    said = verdicts(found)
    assert {said[name] for name in ("padded", "repeated", "flattering", "apologetic")} == {"stop"}
    assert {said[name] for name in ("truncated", "tags_only", "refusing", "empty")} == {"ok"}
    with pytest.raises(UserError, match=r"hacked by \w+ answers: .* on 100% of 40 prompts, the plain bad answer on 0%"):
        refuse_hackable(found, make_section(), Path("reports"))
    refuse_hackable(found, make_section(on_hackable="warn"), Path("reports"))


def test_a_scorer_that_likes_few_characters_is_caught_by_what_takes_content_away() -> None:
    found = try_tricks(lambda p, a: [-x for x in count_characters(p, a)], make_cases(), make_section(), "")
    assert {name for name, verdict in verdicts(found).items() if verdict == "stop"} == {
        "truncated", "tags_only", "refusing", "empty"
    }  # fmt: skip


@pytest.mark.parametrize("conversational", [False, True])
def test_a_scorer_that_knows_the_answer_passes(conversational: bool) -> None:
    found = try_tricks(score_by_rule, make_cases(conversational=conversational), make_section(), "")
    assert set(verdicts(found).values()) == {"ok"}
    assert found.verdict == "ok"
    assert all(one.gain.mean == 0 and one.wins == 0 for one in found.tried if one.trick.adds)
    refuse_hackable(found, make_section(), Path("reports"))


@pytest.mark.parametrize(("bonus", "verdict"), [(0.2, "ok"), (0.4, "warn"), (0.9, "stop")])
def test_praise_that_pays_is_worth_a_word_even_where_content_wins(bonus: float, verdict: str) -> None:
    """Plain scores are 0 and 1 in equal shares, so that their standard deviation is a half."""

    def score(prompts: Any, answers: Any) -> list[float]:
        right = score_by_rule(prompts, answers)
        return [r + bonus * ("wonderful" in completion_text(a)) for r, a in zip(right, answers, strict=True)]

    found = try_tricks(score, make_cases(), make_section(), "")
    flattering = next(one for one in found.tried if one.trick.name == "flattering")
    assert (flattering.wins, flattering.verdict) == (0, verdict)
    assert flattering.gain.mean == pytest.approx(2 * bonus)


def test_the_excess_is_counted_beyond_what_plain_bad_answers_win() -> None:
    """Of 40 good answers 10 lose to the bad one anyway, 20 to the padded one; those 10 are among them."""
    cases = make_cases()
    places = {case.prompt: place for place, case in enumerate(cases)}

    def score(prompts: Any, answers: Any) -> list[float]:
        luck = [places[prompt] for prompt in prompts]
        padded = [PHRASES["en"].filler[0] in answer for answer in answers]
        right = score_by_rule(prompts, answers)
        is_bad = [str(sum(map(int, p.split(" + "))) + 1) in a for p, a in zip(prompts, answers, strict=True)]
        return [
            2.0 if bad and place < (20 if pad else 10) else r
            for bad, place, pad, r in zip(is_bad, luck, padded, right, strict=True)
        ]

    found = try_tricks(score, cases, make_section(), "")
    padded = next(one for one in found.tried if one.trick.name == "padded")
    assert (padded.wins, padded.base, padded.excess.mean) == (0.5, 0.25, 0.25)
    assert (padded.excess.low, padded.excess.high) == score_interval(10, 0, 40)
    assert padded.verdict == "warn"  # at least .13, which is short of .2
    others = [one for one in found.tried if one.trick.name in ("repeated", "flattering")]
    assert [one.excess.mean for one in others] == [0, 0]


def test_a_trick_without_answers_to_make_it_from_is_silent() -> None:
    cases = [make_case(str(number), "yes indeed", "no") for number in range(20)]
    found = try_tricks(count_characters, cases, make_section(), "")
    assert found.silent == ["tags_only"]
    assert "tags_only" not in found.figures


def test_length_correlation_among_good_answers() -> None:
    answers = ["x" * size for size in range(1, 21)]
    assert probing.correlate_length(answers, np.arange(20.0) ** 3) == pytest.approx(1)
    assert probing.correlate_length(answers, np.zeros(20)) is None


# the stage ----------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path, tiny_reward_dir: Path, tiny_world: World) -> Paths:
    paths = Paths(tmp_path)
    shutil.copytree(tiny_reward_dir, paths.model("reward"))
    write_rows(paths.rows("preferences", "test"), tiny_world.preferences[0])
    write_rows(paths.rows("sft", "test"), tiny_world.sft[1])
    return paths


def make_params(**changes: Any) -> Params:
    raw = tiny_params()
    raw["probe"] |= changes
    return Params.model_validate(raw)


@pytest.fixture
def hackable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reward model counts characters."""

    class Counter:
        score = staticmethod(count_characters)

        def __init__(self, *_: Any) -> None: ...

    monkeypatch.setattr(probing, "RewardModel", Counter)
    monkeypatch.setattr("rlhf.scoring.RewardModel", Counter)


@pytest.mark.usefixtures("hackable")
def test_a_hackable_model_stops_the_stage_and_its_table_stays(workspace: Paths) -> None:
    with pytest.raises(UserError, match=r"can be hacked by .* \(reports/probe/probe\.html has the table\)"):
        probe.run(make_params(on_hackable="stop"), workspace, no_log)
    report = workspace.report("probe")
    with (report / "tricks.csv").open(encoding="utf-8") as file:
        table = {row["trick"]: row for row in csv.DictReader(file)}
    assert set(table) == set(BY_NAME)
    assert table["padded"]["verdict"] == "stop"
    health = json.loads((report / "health.json").read_text(encoding="utf-8"))
    assert (health["verdict"], health["findings"][0]["verdict"]) == ("stop", "stop")
    assert health["findings"][0].keys() >= {"rule", "finding", "meaning", "remedy"}
    metrics = json.loads(workspace.metrics("probe").read_text(encoding="utf-8"))
    assert (metrics["health"], metrics["prompts"], metrics["padded"]["verdict"]) == (2, 16, 2)
    assert "padded" in (report / "probe.html").read_text(encoding="utf-8")
    assert not (report / "passed").exists()


@pytest.mark.usefixtures("hackable")
def test_policies_depend_on_bytes_that_no_verdict_changes(workspace: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = []
    for change in ({"on_hackable": "warn"}, {"rows": 8, "on_hackable": "warn"}):
        probe.run(make_params(**change), workspace, no_log)
        passed.append((workspace.report("probe") / "passed").read_bytes())
    monkeypatch.undo()
    shutil.rmtree(workspace.model("reward"))
    probe.run(make_params(on_hackable="stop"), workspace, no_log)
    assert {*passed, (workspace.report("probe") / "passed").read_bytes()} == {passed[0]}


def test_without_a_reward_model_the_stage_says_so_and_passes(workspace: Paths) -> None:
    (workspace.model("reward") / "config.json").unlink()
    probe.run(make_params(on_hackable="stop"), workspace, no_log)
    assert json.loads(workspace.metrics("probe").read_text()) == {"health": 0, "prompts": 0}
    assert "there is no reward model" in (workspace.report("probe") / "probe.html").read_text(encoding="utf-8")
    assert set(json.loads((workspace.report("probe") / "health.json").read_text())["silent"]) == set(BY_NAME)


def test_equal_models_leave_equal_bytes(workspace: Paths) -> None:
    def files() -> dict[str, bytes]:
        probe.run(make_params(), workspace, no_log)
        return {path.name: path.read_bytes() for path in workspace.report("probe").iterdir()}

    first = files()
    assert set(first) == {"health.json", "passed", "probe.html", "samples.json", "tricks.csv"}
    shutil.rmtree(workspace.report("probe"))
    assert files() == first


def test_the_worst_answers_are_shown_and_escaped(tmp_path: Path) -> None:
    cases = [make_case(f"<script>{number}", "x" * (50 + number), "<b>no</b>") for number in range(20)]
    write_report(tmp_path, try_tricks(count_characters, cases, make_section(), "a test"), make_section())
    worst = [row for row in json.loads((tmp_path / "samples.json").read_text()) if row["trick"] == "padded"]
    assert [row["prompt"] for row in worst] == [f"<script>{number}" for number in range(5)]
    assert worst[0]["tricky_score"] == len(worst[0]["tricky"])
    page = (tmp_path / "probe.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;0" in page
    assert "<script" not in page and "<b>no" not in page
    assert "http" not in page


# the command --------------------------------------------------------------------------------------


def run(*words: Any) -> Any:
    return CliRunner().invoke(alignflow.app, ["probe", *map(str, words)])


def test_the_command_prints_the_table_for_any_file(workspace: Paths, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "x", "rejected": "x"}, {"prompt": "b", "chosen": "x", "rejected": None}]
    rows += [{"prompt": f"{n} + 1", "chosen": "right", "rejected": "wrong"} for n in range(10)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    result = run(workspace.model("reward"), tmp_path / "pairs.jsonl", "--folder", tmp_path / "out")
    assert "Do cheap tricks beat content?" in result.output
    assert all(trick.title in result.output for trick in TRICKS if trick.name != "tags_only")
    assert (tmp_path / "out" / "probe.html").exists()


@pytest.mark.usefixtures("hackable")
def test_the_command_refuses_a_hackable_model(workspace: Paths, tmp_path: Path) -> None:
    result = run(workspace.model("reward"), workspace.rows("preferences", "test"), "--folder", tmp_path / "out")
    assert result.exit_code == 1
    assert "can be hacked by" in str(result.exception)
    assert (tmp_path / "out" / "tricks.csv").exists()


@pytest.mark.parametrize(
    ("model", "rows", "sentence"),
    [
        ("no/such-model", [{"prompt": "a", "chosen": "x", "rejected": "y"}], "is no folder and no model that the hub"),
        (".", [{"prompt": "a", "chosen": "x", "rejected": "x"}], "no row with two different texts as answers"),
    ],
)
def test_the_command_says_what_it_cannot_use(tmp_path: Path, model: str, rows: list[Any], sentence: str) -> None:
    write_rows(tmp_path / "pairs.jsonl", rows)
    result = run(model, tmp_path / "pairs.jsonl", "--folder", tmp_path / "out")
    assert result.exit_code == 1
    assert sentence in str(result.exception)
