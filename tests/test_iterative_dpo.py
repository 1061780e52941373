"""Iterative DPO: which answers become pairs, what a round learns from and against, and one series of steps."""

from dataclasses import replace

import pytest
import torch

from rlhf.curves import CurveRecorder, no_log
from rlhf.data.formats import write_rows
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer
from rlhf.policies import iterative_dpo, pairs, train_policy
from rlhf.policies.iterative_dpo import Answers, Series, dpo_section, rank, sample_answers
from rlhf.scoring import Reward
from tests.learning import sample_to_the_limit
from tests.test_families import section
from tests.tiny import share_of_letters


@pytest.fixture
def _letters(monkeypatch):
    """A reward and an end that a model this small comes to."""
    monkeypatch.setattr(iterative_dpo, "sample", sample_to_the_limit)
    monkeypatch.setattr(iterative_dpo, "build_rewards", lambda *_: [Reward("mine", share_of_letters, 1.0)])


def by_length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def answers_of(texts, usable):
    rows = [{"id": str(place // 3), "prompt": f"p{place // 3}", "answer": "1"} for place in range(len(texts))]
    return Answers(rows, texts, usable, {"completions/stop_rate": 0.5})


def test_best_and_worst_make_a_pair_and_equals_make_none():
    texts = ["aa", "a", "aaa", "b", "c", "d", "aaaa", "a", "aa"]
    usable = [True] * 6 + [False, True, True]
    pairs, figures = rank(
        section("iterative_dpo", group_size=3), answers_of(texts, usable), None, [Reward("l", by_length, 2.0)]
    )
    assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("p0", "aaa", "a"),
        ("p2", "aa", "a"),
    ]
    assert len({pair["id"] for pair in pairs}) == 2
    assert figures == {
        "reward": pytest.approx(2 * 16 / 9),
        "rewards/l/mean": pytest.approx(16 / 9),
        "frac_reward_zero_std": pytest.approx(1 / 3),
        "completions/stop_rate": 0.5,
    }


def test_without_usable_answers_there_is_no_pair():
    pairs, figures = rank(
        section("iterative_dpo", group_size=3),
        answers_of(["a", "aa", "b"], [False] * 3),
        None,
        [Reward("l", by_length, 1.0)],
    )
    assert pairs == []
    assert figures["frac_reward_zero_std"] == 1


def test_only_answers_that_ended_are_usable(policy_files):
    torch.manual_seed(0)
    params = section("iterative_dpo", max_new_tokens=60, temperature=2.0, batch_size=24)
    rows = [{"id": "1", "prompt": "What is 2 + 3 ?", "answer": "5"}] * 48
    answers = sample_answers(params, load_causal(policy_files.sft), load_tokenizer(policy_files.sft), rows)
    assert len(answers.texts) == 48
    share = sum(answers.usable) / 48
    assert 0 < share < 1
    assert share <= answers.figures["completions/stop_rate"]
    assert 1 <= answers.figures["completions/mean_length"] <= params.max_new_tokens


def test_rounds_are_one_series_of_steps():
    heard = []
    series = Series(lambda figures, step: heard.append(step))
    for _ in range(2):
        series({}, 0)
        series({}, 10)
        series({}, 12)
        series.close_round()
    assert heard == [0, 10, 12, 12, 22, 24]


@pytest.mark.usefixtures("_letters")
@pytest.mark.parametrize("reference", ["sft", "previous"])
def test_a_round_starts_where_the_last_one_ended_and_is_held_to_its_reference(policy_files, monkeypatch, reference):
    """With `sft` the margin of the first batch of round two is what round one learnt; with `previous` it is zero."""
    starts = []
    original = pairs.load_causal

    def look(folder, *section):
        model = original(folder, *section)
        starts.append(torch.cat([value.flatten() for value in model.parameters()]))
        return model

    monkeypatch.setattr(pairs, "load_causal", look)
    curves = CurveRecorder(no_log)
    train_policy(section("iterative_dpo", reference=reference), policy_files, 0, curves)
    sft = torch.cat([value.flatten() for value in load_causal(policy_files.sft).parameters()])
    first, second = starts[0], starts[-1]
    assert torch.equal(first, sft)
    assert not torch.equal(second, sft)
    assert sorted(curves.rows) == [0, 1, 2]
    assert curves.rows[1]["rewards/margins"] == 0
    assert (curves.rows[2]["rewards/margins"] == 0) == (reference == "previous")
    assert [curves.rows[step]["round"] for step in (0, 1)] == [1, 2]


@pytest.mark.usefixtures("_letters")
def test_the_policy_learns_what_is_rewarded(policy_files):
    sizes = {"rounds": 3, "prompts_per_round": 16, "group_size": 8, "batch_size": 16, "epochs": 3.0}
    params = section("iterative_dpo", **sizes, learning_rate=0.02, sft_weight=1.0)
    curves = CurveRecorder(no_log)
    train_policy(params, policy_files, 0, curves)
    rewards = [row["reward"] for _, row in sorted(curves.rows.items()) if "reward" in row]
    assert len(rewards) == 3
    assert rewards[-1] > rewards[0] + 0.1


def test_a_round_is_dpo_as_written():
    params = section("iterative_dpo", loss="ipo", beta=0.3, sft_weight=1.5, epochs=2.0)
    round_section = dpo_section(params)
    assert (round_section.loss, round_section.beta, round_section.sft_weight) == ("ipo", 0.3, 1.5)
    assert (round_section.epochs, round_section.contradicted) == (2.0, "keep")
    assert round_section.learning_rate == params.learning_rate


def test_without_a_pair_the_first_round_is_refused(policy_files, tmp_path, monkeypatch):
    monkeypatch.setattr(
        iterative_dpo, "build_rewards", lambda *_: [Reward("same", lambda p, c, **_: [1.0] * len(p), 1.0)]
    )
    with pytest.raises(UserError, match="in round 1 no prompt has two whole answers with different rewards"):
        train_policy(section("iterative_dpo"), policy_files, 0, no_log)
    write_rows(tmp_path / "none.jsonl", [])
    with pytest.raises(UserError, match="iterative_dpo has no prompts to answer"):
        train_policy(section("iterative_dpo"), replace(policy_files, prompts=tmp_path / "none.jsonl"), 0, no_log)


@pytest.mark.usefixtures("_letters")
def test_without_a_pair_a_later_round_ends_the_training(policy_files, monkeypatch, caplog):
    rounds = iter([share_of_letters, lambda p, c, **_: [1.0] * len(p)])
    monkeypatch.setattr(
        iterative_dpo, "build_rewards", lambda *_: [Reward("mine", lambda p, c, **_: next(rounds)(p, c), 1.0)]
    )
    curves = CurveRecorder(no_log)
    model = train_policy(section("iterative_dpo", rounds=3), policy_files, 0, curves)
    assert max(curves.rows) == 1
    assert "in round 2 no prompt" in caplog.text
    assert not torch.equal(next(model.parameters()), next(load_causal(policy_files.sft).parameters()))
