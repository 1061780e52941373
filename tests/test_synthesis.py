"""Synthetic data: instructions out of a few, preferences between a model's own answers, and ledgers that add up."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

import alignflow
from rlhf.data.formats import Row, read_rows, row_id, with_ids, write_rows
from rlhf.data.sources import load_source, whole_file
from rlhf.errors import UserError
from rlhf.evaluation.generation import Completion
from rlhf.scoring import Reward
from rlhf.synthesis.files import growing_file, partial_path, read_kind, refuse_overwriting
from rlhf.synthesis.instructions import InstructionSettings, make_instructions
from rlhf.synthesis.making import write_instructions, write_preferences
from rlhf.synthesis.overlap import OverlapIndex
from rlhf.synthesis.preferences import Accounts, PreferenceSettings, load_ranking, make_preferences
from rlhf.synthesis.speaker import ModelSpeaker, load_speaker
from rlhf.synthesis.tally import Tally
from rlhf.synthesis.wording import ask_for_answer, ask_for_tasks, read_answer, read_tasks

SEEDS = with_ids(
    [
        {"prompt": "Name three fruits that grow in cold countries.", "completion": "Apples, pears and plums."},
        {"prompt": "Write a short poem about the sea in winter.", "completion": "Grey is the sea, and slow."},
    ]
)
INSTRUCTIONS = InstructionSettings(
    count=3,
    tries=20,
    examples=2,
    made_examples=1,
    lists=1,
    shortest=4,
    longest=20,
    banned=("picture",),
    overlap=0.7,
    list_tokens=64,
    answer_tokens=32,
    temperature=0.7,
    seed=1,
)


class Script:
    """A Speaker that says what stands in a script: lists of tasks in turn, and one answer for every task."""

    name, is_chat = "script", True

    def __init__(self, lists: list[Completion], answer: Any = None) -> None:
        self.lists, self.asked = lists, []
        self.answer = answer or (lambda _: Completion("A fine reply.", [], True))

    def fits(self, prompt: Any, tokens: int) -> bool:
        return True

    def say(self, prompts: Any, tokens: int, seed: int) -> list[Completion]:
        self.asked += prompts
        if tokens == INSTRUCTIONS.list_tokens:
            return [self.lists.pop(0) if self.lists else Completion("Nothing.", [], True) for _ in prompts]
        return [self.answer(prompt[-1]["content"]) for prompt in prompts]


def _list(*tasks: str, ended: bool = True) -> Completion:
    return Completion("\n\n".join(f"Task {n}: {task}" for n, task in enumerate(tasks, 3)), [], ended)


def _make(speaker: Any, settings: InstructionSettings = INSTRUCTIONS) -> tuple[list[Row], Tally]:
    tally = Tally()
    return list(make_instructions(SEEDS, speaker, settings, tally)), tally


def _adds_up(tally: Tally) -> bool:
    return tally.made == tally.kept + tally.left_out.total()


# overlap ------------------------------------------------------------------------------------------

TEXTS = st.lists(st.sampled_from(list("abcdef")), min_size=0, max_size=8).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(pool=st.lists(TEXTS, max_size=12), text=TEXTS, limit=st.sampled_from([0.3, 0.5, 0.7, 1.0]))
def test_the_prefilter_loses_no_match(pool: list[str], text: str, limit: float) -> None:
    index = OverlapIndex(limit)
    for one in pool:
        index.add(one)
    plain = RougeScorer(["rougeL"])
    expected = any(plain.score(one, text)["rougeL"].fmeasure >= limit - 1e-9 for one in pool)
    assert (index.find(text) is not None) == expected


def test_the_prefilter_compares_few_of_many() -> None:
    chance, words = random.Random(1), [f"w{number}" for number in range(300)]
    index = OverlapIndex(0.7)
    texts = [" ".join(chance.choices(words, k=12)) for _ in range(2000)]
    for text in texts:
        index.add(text)
    assert index.find(texts[1500] + " more") == texts[1500]
    assert index.compared < 10


def test_overlap_sees_scripts_without_spaces() -> None:
    index = OverlapIndex(0.7)
    index.add("请写一首关于大海的短诗")
    assert index.find("请写一首关于高山的短诗")
    assert index.find("列出三种水果") is None


# instructions -------------------------------------------------------------------------------------


def test_each_filter_takes_what_it_names_and_the_rest_becomes_rows() -> None:
    def answer(task: str) -> Completion:
        said = {"empty": "  ", "repeat": f"You said: {task} " + "Well. " * 30, "endless": "And so on and"}
        word = next((word for word in said if word in task), None)
        return Completion(said[word] if word else "A fine reply.", [], word != "endless")

    speaker = Script(
        [
            _list(
                "Explain why bread rises in the oven.",
                "Too short.",
                " ".join(["long"] * 30),
                "Describe the picture that hangs here.",
                "Name three fruits that grow in cold lands.",
                "Name three fruits that grow  in COLD countries.",
                "Give an empty reply to somebody now.",
                "Please repeat whatever you were told.",
                "Tell an endless tale without any stop.",
                "This one was cut in the",
                ended=False,
            ),
            Completion("I would rather not.", [], True),
            _list(
                "Compare a train with an aeroplane.", "How do magpies build their nests?", "Sort these by size: 3 1 2"
            ),
        ],
        answer,
    )
    rows, tally = _make(speaker)
    assert [row["prompt"] for row in rows] == [
        "Explain why bread rises in the oven.",
        "Compare a train with an aeroplane.",
        "How do magpies build their nests?",
    ]
    reasons = "too_short too_long banned_word overlap duplicate answer_empty answer_repeats_instruction "
    reasons += "answer_cut_off cut_off no_task not_needed"
    assert tally.left_out == dict.fromkeys(reasons.split(), 1)
    assert (tally.made, tally.kept) == (14, 3)


def test_rows_say_where_they_come_from_and_have_the_form_of_the_seeds() -> None:
    (row,), _ = _make(Script([_list("Explain why bread rises in the oven.")]), replace(INSTRUCTIONS, tries=1))
    assert row["id"] == row_id(row)
    assert (row["source_model"], row["sampled_at_temperature"]) == ("script", 0.7)
    assert set(row["shown_seeds"]) == {seed["id"] for seed in SEEDS}

    messages = [
        {
            **seed,
            "prompt": [{"role": "user", "content": seed["prompt"]}],
            "completion": [{"role": "assistant", "content": "Yes."}],
        }
        for seed in SEEDS
    ]
    (row,) = make_instructions(
        messages, Script([_list("Explain why bread rises in the oven.")]), replace(INSTRUCTIONS, tries=1), Tally()
    )
    assert row["prompt"] == [{"role": "user", "content": "Explain why bread rises in the oven."}]
    assert row["completion"] == [{"role": "assistant", "content": "A fine reply."}]


def test_what_was_made_is_shown_in_later_rounds() -> None:
    lists = [_list("Explain why bread rises in the oven."), _list("How do magpies build their nests?")]
    speaker = Script(lists)
    _make(speaker, replace(INSTRUCTIONS, count=2))
    requests = [asked[-1]["content"] for asked in speaker.asked if "Here are tasks" in asked[-1]["content"]]
    assert ["bread rises" in request for request in requests] == [False, True]


@settings(max_examples=60, deadline=None)
@given(
    lists=st.lists(st.lists(TEXTS, max_size=5).map(lambda tasks: _list(*tasks, ended=len(tasks) != 3)), max_size=6),
    answers=st.lists(st.sampled_from(["", "A fine reply.", "a b c d e"]), min_size=1),
    count=st.integers(1, 4),
)
def test_the_ledger_of_instructions_adds_up(lists: list[Completion], answers: list[str], count: int) -> None:
    cycle = iter(answers * 50)
    rows, tally = _make(
        Script(lists, lambda _: Completion(next(cycle), [], True)), replace(INSTRUCTIONS, count=count, shortest=1)
    )
    assert _adds_up(tally)
    assert tally.kept == len(rows) <= count


def test_a_text_model_is_given_solved_tasks_and_read_up_to_the_next() -> None:
    assert ask_for_tasks(["Sing.", "Dance."], is_chat=False).endswith("Task 1: Sing.\n\nTask 2: Dance.\n\nTask 3:")
    assert (
        ask_for_answer("Sing.", [("Dance.", "No.")], is_chat=False)
        == "Task: Dance.\nAnswer: No.\n\nTask: Sing.\nAnswer:"
    )
    said = Completion(" Count to three.\n\nTask 4: Count to", [], False)
    assert read_tasks(said, is_chat=False) == [("Count to three.", True), ("Count to", False)]
    assert read_answer(Completion(" La la.\n\nTask: Dance.", [], False), is_chat=False) == ("La la.", True)
    assert read_answer(Completion(" La la", [], False), is_chat=False) == ("La la", False)


def test_no_seeds_and_no_room_are_errors() -> None:
    with pytest.raises(UserError, match="no seed task"):
        list(make_instructions([], Script([]), INSTRUCTIONS, Tally()))
    narrow = Script([])
    narrow.fits = lambda prompt, tokens: False
    with pytest.raises(UserError, match="does not hold one example"):
        _make(narrow)


def test_nothing_kept_is_an_error_after_the_ledger_is_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "seeds.jsonl", SEEDS)
    with pytest.raises(UserError, match="none of 20 candidates is left"):
        write_instructions(
            read_kind(tmp_path / "seeds.jsonl", "sft"), tmp_path / "made.jsonl", Script([]), INSTRUCTIONS
        )
    ledger = json.loads((tmp_path / "made-report" / "ledger.json").read_text())
    assert ledger["instructions"]["left_out"] == {"no_task": 20}
    assert not (tmp_path / "made.jsonl").exists() and not partial_path(tmp_path / "made.jsonl").exists()


# files --------------------------------------------------------------------------------------------


def test_what_was_made_before_a_stop_is_kept_and_then_not_overwritten(tmp_path: Path, caplog: Any) -> None:
    out = tmp_path / "made.jsonl"

    def stop() -> None:
        with growing_file(out) as write:
            write({"prompt": "one"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert read_rows(partial_path(out)) == [{"prompt": "one"}]
    assert not out.exists() and str(partial_path(out)) in caplog.text
    with pytest.raises(UserError, match="partial exists already"):
        refuse_overwriting(out, force=False)
    refuse_overwriting(out, force=True)


# preferences --------------------------------------------------------------------------------------

PREFERENCES = PreferenceSettings(samples=4, against="worst", max_new_tokens=8, temperature=1.0, seed=3)


def _length(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


BY_LENGTH = [Reward("length", _length, 1.0)]


class Scripted(ModelSpeaker):
    """The tiny model's tokenizer and context with answers from a script."""

    def say(self, prompts: Any, tokens: int, seed: int) -> list[Completion]:
        return [Completion(text, [], ended) for text, ended in ANSWERS[: len(prompts)]]


ANSWERS: list[tuple[str, bool]] = []


@pytest.fixture(scope="module")
def speaker(tiny_model_dir: Path) -> ModelSpeaker:
    return load_speaker(str(tiny_model_dir), 1.0, 16, 3)


@pytest.fixture
def scripted(speaker: ModelSpeaker) -> Scripted:
    return Scripted("script", speaker.model, speaker.tokenizer, speaker.decoding)


def _pairs(speaker: Any, answers: list[tuple[str, bool]], **changes: Any) -> tuple[list[Row], Accounts]:
    ANSWERS[:] = answers
    rows = with_ids([{"prompt": f"{place} + 1", "answer": "2"} for place in range(len(answers) // 4)])
    accounts = Accounts(Tally(), Tally())
    return list(make_preferences(rows, speaker, BY_LENGTH, replace(PREFERENCES, **changes), accounts)), accounts


def test_best_meets_worst_and_cut_answers_meet_nobody(scripted: Scripted) -> None:
    ended = [("1 1", True), ("1 1 1 1", True), ("1 1 1 1 1 1", False), ("1", True)]
    (pair,), accounts = _pairs(scripted, ended)
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == ("1 1 1 1", "1", 6.0)
    assert (pair["chosen_reward"], pair["rejected_reward"]) == (7.0, 1.0)
    assert (pair["chosen_rank"], pair["rejected_rank"], pair["answers_ranked"]) == (1, 3, 3)
    assert (pair["source_model"], pair["answer"], pair["id"]) == ("script", "2", row_id(pair))
    assert accounts.answers.left_out == {"cut_off": 1, "not_in_the_pair": 1}


def test_equal_rewards_and_too_few_answers_give_no_pair_and_are_counted(scripted: Scripted) -> None:
    equal = [("1 2", True), ("2 1", True), ("3 1", True), ("1 3", True)]
    alone = [("1", True), ("1 1", False), (" ", True), ("1 1 1", False)]
    pairs, accounts = _pairs(scripted, equal + alone)
    assert pairs == []
    assert accounts.prompts.left_out == {"equal_rewards": 1, "fewer_than_two_whole_answers": 1}
    assert accounts.answers.left_out == {"without_a_pair": 5, "cut_off": 2, "empty": 1}


def test_against_random_takes_any_that_is_worse(scripted: Scripted) -> None:
    answers = [("1", True), ("1 1", True), ("1 1 1", True), ("1 1 1", True)] * 20
    pairs, _ = _pairs(scripted, answers, against="random")
    assert {pair["rejected"] for pair in pairs} == {"1", "1 1"}
    assert all(pair["chosen"] == "1 1 1" for pair in pairs)


@settings(max_examples=40, deadline=None)
@given(answers=st.lists(st.tuples(st.sampled_from(["", "1", "1 1", "2 2"]), st.booleans()), max_size=24))
def test_the_ledgers_of_preferences_add_up(speaker: ModelSpeaker, answers: list[tuple[str, bool]]) -> None:
    answers = answers[: len(answers) // 4 * 4] or [("1", True)] * 4
    pairs, accounts = _pairs(Scripted("script", speaker.model, speaker.tokenizer, speaker.decoding), answers)
    assert _adds_up(accounts.prompts) and _adds_up(accounts.answers)
    assert (accounts.prompts.made, accounts.answers.made) == (len(answers) // 4, len(answers))
    assert accounts.prompts.kept == len(pairs) and accounts.answers.kept == 2 * len(pairs)
    assert all(pair["margin"] > 0 for pair in pairs)


def test_a_model_samples_alike_for_a_seed_whatever_the_batch(
    speaker: ModelSpeaker, tiny_world: Any, tmp_path: Path
) -> None:
    write_rows(tmp_path / "prompts.jsonl", tiny_world.prompts[0])
    settings = replace(PREFERENCES, max_new_tokens=24)

    def make(name: str, batch_size: int, seed: int) -> bytes:
        model = replace(speaker, decoding=replace(speaker.decoding, batch_size=batch_size))
        lengths = [Reward("length", _length, 1.0)]
        rows = read_kind(tmp_path / "prompts.jsonl", "prompts")
        write_preferences(rows, tmp_path / name, model, lengths, replace(settings, seed=seed))
        return (tmp_path / name).read_bytes()

    # A model with random weights ends an answer now and then; half-way ones make no pair.
    speaker.model.get_output_embeddings().weight.data[speaker.tokenizer.eos_token_id] += 0.5
    assert make("one.jsonl", 4, 3) == make("two.jsonl", 64, 3) != make("three.jsonl", 64, 4)
    rows = list(load_source(whole_file(tmp_path / "one.jsonl"), "preferences", Path()))
    bias = json.loads((tmp_path / "one-report" / "bias.json").read_text())
    style = {row["what"]: row["value"] for row in bias["Chosen less rejected"]}
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)
    assert style["chosen_longer_share"] == pytest.approx(longer) and style["cohens_d_characters"] > 0
    assert "one.jsonl" in (tmp_path / "one-report" / "report.html").read_text()


def test_one_answer_or_no_room_is_an_error(speaker: ModelSpeaker) -> None:
    rows, accounts = with_ids([{"prompt": "1 + 1"}]), Accounts(Tally(), Tally())
    for changes, words in (
        ({"samples": 1}, "takes two answers"),
        ({"against": "best"}, "worst or random"),
        ({"max_new_tokens": 10_000}, "holds none of the 1 prompts"),
    ):
        with pytest.raises(UserError, match=words):
            list(make_preferences(rows, speaker, BY_LENGTH, replace(PREFERENCES, **changes), accounts))


def test_rewards_come_from_a_file_or_a_reward_model(
    tmp_path: Path, tiny_model_dir: Path, tiny_reward_dir: Path
) -> None:
    rank = tmp_path / "rank.yaml"
    rank.write_text("rewards:\n  right: {kind: answer, weight: 1.0, answer_in: text}\n")

    def load(path: Path | None, model: str | None) -> list[Reward]:
        return load_ranking(path, model, str(tiny_model_dir), 8)

    assert [reward.name for reward in load(rank, None)] == ["right"]
    assert [reward.name for reward in load(None, str(tiny_reward_dir))] == ["reward_model"]
    with pytest.raises(UserError, match="nothing ranks"):
        load(None, None)
    with pytest.raises(UserError, match="no reward of kind reward_model"):
        load(rank, str(tiny_reward_dir))
    rank.write_text("rewards:\n  right: {kind: answer, weight: 1.0, answer_im: text}\n")
    with pytest.raises(
        UserError, match=r"unknown key rewards\.right\.answer_im; did you mean rewards\.right\.answer_in"
    ):
        load(rank, None)
    rank.write_text("rewards:\n  score: {kind: reward_model, weight: 1.0}\n")
    with pytest.raises(UserError, match="name its folder with --reward-model"):
        load(rank, None)


@pytest.mark.parametrize("command", ["instructions", "preferences"])
def test_the_commands_refuse_in_a_sentence(command: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    out = tmp_path / "made.jsonl"
    out.write_text("mine\n")
    words = ["data", command, "nowhere.jsonl", "--model", "nowhere", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["alignflow", *words, *(["--count", "1"] if command == "instructions" else [])])
    with pytest.raises(SystemExit) as stopped:
        alignflow.main()
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n")) == (1, 1)
    assert f"{out} exists already" in said and out.read_text() == "mine\n"
