"""Wrong and odd input of what learns online: a sentence before the first update, or a training that stays sound."""

import math
import shutil
from dataclasses import replace

import pytest
from transformers import AutoModelForSequenceClassification

from rlhf.curves import CurveRecorder, no_log
from rlhf.data.formats import training_rows
from rlhf.errors import UserError
from rlhf.models import load_causal, load_scorer, load_tokenizer, save_model
from rlhf.params import AdapterParams
from rlhf.policies import groups, iterative_dpo, ppo, train_policy
from rlhf.scoring import Reward
from tests import test_families
from tests.learning import sample_to_the_limit
from tests.tiny import share_of_letters

ONLINE = ("ppo", "grpo", "rloo", "iterative_dpo")
SIZES = {"steps": 1, "batch_size": 8, "max_new_tokens": 6}


def section(algorithm, **changes):
    if algorithm == "ppo":
        return test_families.PARAMS.policies["ppo"].model_copy(update=SIZES | {"minibatches": 1} | changes)
    own = {"rounds": 1} if algorithm == "iterative_dpo" else SIZES
    return test_families.section(algorithm, **own).model_copy(update=changes)


def refused(sentence, params, files):
    with pytest.raises(UserError, match=sentence) as caught:
        train_policy(params, files, 0, lambda *_: pytest.fail("there was an update"))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def rewarding(monkeypatch):
    monkeypatch.setattr(iterative_dpo, "sample", sample_to_the_limit)

    def by(function):
        for module in (ppo, groups, iterative_dpo):
            monkeypatch.setattr(module, "build_rewards", lambda *_: [Reward("mine", function, 1.0)])

    return by


@pytest.mark.parametrize("algorithm", ONLINE)
def test_a_prompt_must_leave_room_for_an_answer(policy_files, rewarding, algorithm):
    rewarding(share_of_letters)
    first = training_rows(policy_files.prompts)[0]["id"]
    sentence = rf"row {first} of prompts is \d+ tokens long, the model reads 128 tokens and max_new_tokens is 120"
    refused(sentence, section(algorithm, max_new_tokens=120), policy_files)


@pytest.mark.parametrize("algorithm", ONLINE)
def test_a_reward_that_fails_keeps_its_cause(policy_files, rewarding, algorithm):
    def fail(prompts, completions, **columns):
        return [float(answer) for answer in columns["solution"]]

    rewarding(fail)
    error = refused(r"the reward `mine` failed \(KeyError: 'solution'\)", section(algorithm), policy_files)
    assert isinstance(error.__cause__, KeyError)


@pytest.mark.parametrize("values", [[None] * 8, [math.nan] * 8, [1.0] * 7, None])
def test_a_broken_reward_is_named_between_rounds_too(policy_files, rewarding, values):
    rewarding(lambda prompts, completions, **columns: values)
    refused("the reward `mine`", section("iterative_dpo", prompts_per_round=2), policy_files)


@pytest.mark.parametrize("algorithm", ["grpo", "iterative_dpo"])
def test_a_reward_model_with_two_labels_is_refused(policy_files, tmp_path, algorithm):
    two = AutoModelForSequenceClassification.from_pretrained(
        policy_files.reward, num_labels=2, ignore_mismatched_sizes=True
    )
    save_model(two, load_tokenizer(policy_files.reward), tmp_path)
    mix = test_families.PARAMS.policies["ppo"].rewards
    refused("has 2 labels, not 1", section(algorithm, rewards=mix), replace(policy_files, reward=tmp_path))


@pytest.mark.parametrize("algorithm", ["grpo", "dpo", "iterative_dpo"])
def test_an_adapter_on_modules_that_are_not_there_is_refused(policy_files, rewarding, algorithm):
    rewarding(share_of_letters)
    adapter = AdapterParams(rank=2, alpha=4, dropout=0.0, target_modules=["attention_out"], quantise=None)
    params = section(algorithm) if algorithm != "dpo" else test_families.section("dpo")
    with pytest.raises(UserError, match=r"adapter.target_modules is \['attention_out'\], which does not fit"):
        train_policy(params.model_copy(update={"adapter": adapter}), policy_files, 0, no_log)


# odd but sound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_reward_model_with_another_vocabulary_reads_texts(policy_files, tmp_path, algorithm):
    """The critic cannot start from it, and says so; the scores are those of the texts."""
    tokenizer, scorer = load_tokenizer(policy_files.reward), load_scorer(policy_files.reward)
    tokenizer.add_tokens(["= 1", "so"])
    scorer.resize_token_embeddings(len(tokenizer))
    save_model(scorer, tokenizer, tmp_path)
    mix = test_families.PARAMS.policies["ppo"].rewards
    curves = CurveRecorder(no_log)
    train_policy(section(algorithm, rewards=mix), replace(policy_files, reward=tmp_path), 0, curves)
    assert all(math.isfinite(value) for value in curves.rows[1].values())


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "iterative_dpo"])
def test_the_end_token_may_pad(policy_files, rewarding, tmp_path, algorithm):
    rewarding(share_of_letters)
    shutil.copytree(policy_files.sft, tmp_path / "sft")
    tokenizer, model = load_tokenizer(policy_files.sft), load_causal(policy_files.sft)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.eos_token_id
    save_model(model, tokenizer, tmp_path / "sft")
    curves = CurveRecorder(no_log)
    train_policy(section(algorithm), replace(policy_files, sft=tmp_path / "sft"), 0, curves)
    last = curves.rows[max(curves.rows)]
    assert all(math.isfinite(value) for value in last.values())
    assert any(value > 0 for name, value in last.items() if "grad_norm" in name)


def test_where_no_answer_ends_grpo_without_truncated_ones_learns_nothing_and_stays_finite(policy_files, rewarding):
    rewarding(share_of_letters)
    curves = CurveRecorder(no_log)
    params = section("grpo", mask_truncated=True, max_new_tokens=2, loss="dapo", beta=0.0)
    train_policy(params, policy_files, 0, curves)
    assert curves.rows[1]["completions/clipped_ratio"] == 1
    assert curves.rows[1]["grad_norm"] == 0
