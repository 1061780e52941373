"""Dynamic sampling: groups with equal rewards make room for others, and what is learnt from stays of one piece."""

import logging

import pytest
import torch

from rlhf.curves import CurveRecorder, no_log
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer, trainer_settings
from rlhf.params import DynamicSampling
from rlhf.params_file import load_params
from rlhf.policies import groups, grpo, ppo, train_policy
from rlhf.policies.actors import load_models, response_logits
from rlhf.policies.grpo import RefillingTrainer
from rlhf.policies.objectives import equal_groups, token_log_probs
from rlhf.policies.refills import exchange, further_prompts, refilled, replace_rows
from rlhf.policies.rollout import judge, roll_out
from rlhf.scoring import Reward
from tests.tiny import ROOT, share_of_letters

SIZES = {"steps": 2, "batch_size": 16, "group_size": 4, "max_new_tokens": 6}


def letters_of_some(prompts, completions, **columns):
    """A reward that says nothing of half the prompts: their groups are equal whatever is answered."""
    shares = share_of_letters(prompts, completions)
    return [share if len(prompt) % 2 else 0.5 for prompt, share in zip(prompts, shares, strict=True)]


def nothing(prompts, completions, **columns):
    return [0.0] * len(prompts)


def section(algorithm, max_refills, **changes):
    params = load_params(ROOT / "params.yaml").policies[algorithm]
    if algorithm == "ppo":
        changes = {"advantage": "leave_one_out", "beta": 0.0, "missing_eos_penalty": 0.0, "minibatches": 2} | changes
    dynamic = DynamicSampling(max_refills=max_refills) if max_refills else None
    return params.model_copy(update=SIZES | {"dynamic_sampling": dynamic} | changes)


@pytest.fixture
def rewarding(monkeypatch):
    def by(function):
        for module in (ppo, groups):
            monkeypatch.setattr(module, "build_rewards", lambda *_: [Reward("mine", function, 1.0)])

    return by


# parts --------------------------------------------------------------------------------------------


def test_groups_are_equal_where_no_score_differs():
    scores = torch.tensor([0.2, 0.2, 0.2, 0.3, 0.0, 0.0, 1.0, 0.0])
    assert equal_groups(scores, 2).tolist() == [True, False, True, False]
    assert equal_groups(scores, 4).tolist() == [False, False]
    assert equal_groups(torch.full((8,), 0.2), 8).tolist() == [True], "a mean would be off by rounding"


def test_as_many_groups_are_exchanged_as_there_are_on_both_sides():
    equal, fresh = torch.tensor([True, False, True, True]), torch.tensor([True, False, False])
    targets, sources = exchange(equal, fresh, 2)
    assert targets.tolist() == [0, 1, 4, 5]
    assert sources.tolist() == [2, 3, 4, 5]
    assert [len(rows) for rows in exchange(equal, torch.tensor([True]), 2)] == [0, 0]


def test_rows_are_replaced_and_widened_on_the_side_asked_for():
    old, fresh = torch.ones(3, 2), torch.full((2, 3), 5.0)
    places = torch.tensor([2]), torch.tensor([0])
    assert replace_rows(old, places[0], fresh, places[1]).tolist() == [[1, 1, 0], [1, 1, 0], [5, 5, 5]]
    assert replace_rows(old, places[0], fresh, places[1], left=True).tolist() == [[0, 1, 1], [0, 1, 1], [5, 5, 5]]
    assert replace_rows(fresh, torch.tensor([1]), old, torch.tensor([0])).tolist() == [[5, 5, 5], [1, 1, 0]]


def test_further_prompts_follow_from_seed_step_and_refill():
    rows = [{"prompt": str(index)} for index in range(40)]
    drawn = further_prompts(rows, 0, 3, 1, 40)
    assert drawn == further_prompts(rows, 0, 3, 1, 40)
    assert sorted(row["prompt"] for row in drawn) == sorted(row["prompt"] for row in rows)
    others = [further_prompts(rows, *place, 40) for place in ((1, 3, 1), (0, 4, 1), (0, 3, 2))]
    assert drawn not in others
    assert len(further_prompts(rows[:3], 0, 0, 1, 8)) == 8


# PPO ----------------------------------------------------------------------------------------------


def test_a_refilled_rollout_is_as_if_sampled_in_one_piece(policy_files):
    """Rewards, log-probabilities and values of the merged batch are those that the models give it."""
    params = section("ppo", 3, missing_eos_penalty=1.0)
    torch.manual_seed(0)
    models, tokenizer = load_models(params, policy_files), load_tokenizer(policy_files.sft)
    rewards = [Reward("mine", letters_of_some, 1.0)]
    asked = []

    def sample(rows):
        asked.append(len(rows))
        rollout = roll_out(params, models, tokenizer, rows)
        return rollout, *judge(rollout, tokenizer, rewards)

    short, long = {"id": "2", "prompt": "abc"}, {"id": "3", "prompt": "What is 2 + 3 + 4 + 5 ?"}
    dull = {"id": "1", "prompt": "What is 2 + 3 ?!"}
    assert [len(row["prompt"]) % 2 for row in (short, long, dull)] == [1, 1, 0]
    first = sample([row for row in (short, dull, dull, short) for _ in range(4)])
    given = [[dull, long], [long]]
    rollout, raw, figures = refilled(params, first, sample, lambda refill, groups: given[refill - 1][:groups])
    assert asked == [16, 8, 4]
    assert [row["id"] for row in rollout.rows[::4]] == ["2", "3", "3", "2"]
    again, _ = judge(rollout, tokenizer, rewards)
    assert torch.equal(again, raw)
    with torch.no_grad():
        logits = response_logits(models.policy, rollout.batch)
    log_probs = token_log_probs(logits, rollout.batch.responses, params.temperature)
    mask = rollout.batch.mask
    torch.testing.assert_close(rollout.log_probs * mask, log_probs * mask, atol=1e-4, rtol=1e-4)
    assert figures["groups/dropped"] == pytest.approx(12 / 28)
    assert figures["groups/refills"] == 2
    assert figures["rewards/mine"] != pytest.approx(raw.mean().item()), "dropped answers count"


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_what_is_learnt_from_differs(policy_files, rewarding, algorithm):
    rewarding(letters_of_some)
    curves = CurveRecorder(no_log)
    train_policy(section(algorithm, 8), policy_files, 0, curves)
    last = curves.rows[2]
    assert last["frac_reward_zero_std"] == 0
    assert last["groups/refills"] >= 1
    assert 0.1 < last["groups/dropped"] < 0.8


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_at_the_limit_equal_groups_stay_and_teach_nothing(policy_files, rewarding, caplog, algorithm):
    rewarding(nothing)
    curves = CurveRecorder(no_log)
    with caplog.at_level(logging.WARNING):
        model = train_policy(section(algorithm, 2, beta=0.0), policy_files, 0, curves)
    assert curves.rows[2]["frac_reward_zero_std"] == 1
    assert curves.rows[2]["groups/refills"] == 2
    assert curves.rows[2]["groups/dropped"] == pytest.approx(2 / 3)
    assert "all 4 groups of a step have equal rewards, refills too" in caplog.text
    for old, new in zip(load_causal(policy_files.sft).parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)


# GRPO ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_equal_groups_are_counted_without_refills_and_despite_rounding(policy_files, rewarding, algorithm):
    """The deviation of eight rewards of 1.2 is 10⁻⁷, which TRL takes for a difference."""
    rewarding(lambda prompts, completions, **columns: [1.2] * len(prompts))
    curves = CurveRecorder(no_log)
    params = load_params(ROOT / "recipes" / "all-methods.yaml").policies[algorithm]
    train_policy(params.model_copy(update=SIZES | {"group_size": 8}), policy_files, 0, curves)
    assert curves.rows[2]["frac_reward_zero_std"] == 1
    assert "groups/refills" not in curves.rows[2]


def test_a_refilled_batch_of_trl_is_as_if_sampled_in_one_piece(policy_files, rewarding, monkeypatch):
    rewarding(letters_of_some)
    seen = []
    original = RefillingTrainer._generate_and_score_completions

    def look(self, inputs):
        batch = original(self, inputs)
        tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        length = batch["completion_ids"].shape[1]
        expected, _, _ = self._get_per_token_logps_and_entropies(self.ref_model, tokens, attention, length)
        seen.append((batch, expected, self.processing_class))
        return batch

    monkeypatch.setattr(RefillingTrainer, "_generate_and_score_completions", look)
    train_policy(section("grpo", 8), policy_files, 0, no_log)
    for batch, expected, tokenizer in seen:
        mask = batch["completion_mask"]
        torch.testing.assert_close(batch["ref_per_token_logps"] * mask, expected * mask, atol=1e-4, rtol=1e-4)
        assert batch["num_items_in_batch"] == mask.sum()
        prompts = tokenizer.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
        answers = tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        assert all(len(set(prompts[first : first + 4])) == 1 for first in range(0, 16, 4))
        rewards = torch.tensor(share_of_letters(prompts, answers)).view(-1, 4)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(batch["advantages"].view(-1, 4), advantages, atol=1e-3, rtol=1e-3)
    assert len(seen) == 2


def test_every_process_needs_whole_groups(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    params = section("grpo", 1)
    settings = trainer_settings(params, 0, tmp_path) | groups.group_settings(params)
    with pytest.raises(UserError, match="each of 8 processes samples 2 answers at a time, no multiple of group_size 4"):
        grpo.configuration(params, settings)
