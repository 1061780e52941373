"""PPO: invariants of one step on a tiny model, and a policy that learns something it can be seen to learn."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from rlhf.curves import CurveRecorder, no_log
from rlhf.data.formats import training_rows
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer, save_model
from rlhf.params import AdapterParams
from rlhf.params_file import load_params
from rlhf.policies import ppo as algorithm
from rlhf.policies import train_policy
from rlhf.policies.actors import Batch, load_models, response_logits
from rlhf.policies.advantages import Adaptive, estimate, settle_scores
from rlhf.policies.objectives import token_log_probs
from rlhf.policies.rollout import judge, prompt_batches, roll_out
from rlhf.policies.updates import Optimiser
from rlhf.scoring import Reward
from rlhf.training import finished_policy
from tests.tiny import share_of_letters

ROOT = Path(__file__).parent.parent


@pytest.fixture
def params():
    section = load_params(ROOT / "params.yaml").policies["ppo"]
    return section.model_copy(
        update={"steps": 2, "batch_size": 8, "minibatches": 2, "max_new_tokens": 6, "temperature": 0.8}
    )


def start(params, policy_files, seed=0):
    """Models, tokenizer and a first rollout."""
    torch.manual_seed(seed)
    models = load_models(params, policy_files)
    tokenizer = load_tokenizer(policy_files.sft)
    rows = next(prompt_batches(training_rows(policy_files.prompts), params.batch_size, params.group_size, 0))
    return models, tokenizer, roll_out(params, models, tokenizer, rows)


def learn(params, models, rollout):
    """One rollout's updates towards scores from −1 to 1."""
    torch.manual_seed(3)
    experience = estimate(params, rollout, torch.linspace(-1, 1, len(rollout.rows)), params.beta)
    return Optimiser(params, models).update(rollout, experience, params.beta)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_training_moves_every_parameter_and_logs_finite_figures(params, policy_files):
    curves = CurveRecorder(no_log)
    model = train_policy(params, policy_files, 0, curves)
    before = load_causal(policy_files.sft)
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(new, old), name
    assert set(curves.rows) == {1, 2}
    assert all(torch.isfinite(torch.tensor(value)) for row in curves.rows.values() for value in row.values())


def test_the_same_seed_gives_the_same_bytes(params, policy_files, tmp_path):
    for name in ("first", "second"):
        save_model(train_policy(params, policy_files, 5, no_log), load_tokenizer(policy_files.sft), tmp_path / name)
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_at_the_start_policy_and_reference_agree_and_the_critic_says_zero(params, policy_files):
    _, _, rollout = start(params, policy_files)
    torch.testing.assert_close(rollout.log_probs, rollout.reference_log_probs)
    assert not (rollout.values * rollout.batch.mask).any()


def test_log_probs_do_not_depend_on_padding_or_neighbours(params, policy_files):
    models, tokenizer, rollout = start(params, policy_files)
    for index in range(3):
        width = int(rollout.batch.mask[index].sum())
        prompt = rollout.batch.attention[index, : rollout.batch.prompt_length].bool()
        tokens = torch.cat(
            [rollout.batch.tokens[index, : rollout.batch.prompt_length][prompt], rollout.batch.responses[index, :width]]
        )
        alone = Batch(tokens[None], torch.ones_like(tokens)[None], int(prompt.sum()))
        logits = response_logits(models.policy, alone)
        expected = token_log_probs(logits, alone.responses, params.temperature)[0]
        torch.testing.assert_close(rollout.log_probs[index, :width], expected, atol=1e-5, rtol=1e-4)


def test_a_response_reaches_to_its_first_end_token(params, policy_files):
    _, tokenizer, rollout = start(
        params.model_copy(update={"max_new_tokens": 60, "temperature": 5.0, "batch_size": 64}), policy_files
    )
    assert rollout.ended.any() and not rollout.ended.all()
    for tokens, mask, ended in zip(rollout.batch.responses, rollout.batch.mask, rollout.ended, strict=True):
        kept = tokens[mask.bool()].tolist()
        assert (tokenizer.eos_token_id in kept) == bool(ended)
        assert tokenizer.eos_token_id not in kept[:-1]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulation_gives_the_gradient_of_the_whole_minibatch(params, policy_files, parts):
    """Update once with 1, 2 and 4 parts; the policy ends at the same place."""
    ends = []
    for accumulation in (1, parts):
        section = params.model_copy(
            update={"minibatches": 1, "update_epochs": 1, "gradient_accumulation_steps": accumulation}
        )
        models, tokenizer, rollout = start(section, policy_files)
        learn(section, models, rollout)
        ends.append(weights(models.policy))
    torch.testing.assert_close(ends[0], ends[1], atol=2e-5, rtol=0)


def test_updates_per_rollout_are_epochs_times_minibatches(params, policy_files, monkeypatch):
    steps = []
    monkeypatch.setattr(Optimiser, "_step", lambda self: steps.append(1) or {"x": 0.0})
    section = params.model_copy(update={"update_epochs": 4, "minibatches": 4, "gradient_accumulation_steps": 2})
    models, _, rollout = start(section, policy_files)
    learn(section, models, rollout)
    assert len(steps) == 16


def test_every_prompt_comes_before_any_comes_again():
    batches = prompt_batches([{"prompt": str(index)} for index in range(10)], 4, 1, 0)
    seen = [row["prompt"] for batch in islice(batches, 5) for row in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(str(index) for index in range(10))


def test_an_unended_answer_is_penalised_and_scores_are_clipped(params, policy_files):
    section = params.model_copy(update={"missing_eos_penalty": 3.0, "score_clip": 0.25})
    _, tokenizer, rollout = start(section, policy_files)
    reward = Reward("ten", lambda prompts, completions, **columns: [10.0] * len(prompts), 1.0)
    raw, figures = judge(rollout, tokenizer, [reward])
    scores = settle_scores(section, raw, torch.tensor([True, False] * 4), Adaptive(section.beta))
    assert scores.tolist() == pytest.approx([0.25, -2.75] * 4)
    assert figures == {"rewards/ten": 10.0}


def test_the_policy_learns_what_is_rewarded(params, policy_files, monkeypatch):
    """A reward for small Latin letters: after a few rollouts most of what the policy writes are such letters."""
    reward = Reward("letters", share_of_letters, 1.0)
    monkeypatch.setattr(algorithm, "build_rewards", lambda *_: [reward])
    section = params.model_copy(
        update={
            "steps": 24,
            "batch_size": 32,
            "learning_rate": 0.01,
            "beta": 0.0,
            "missing_eos_penalty": 0.0,
            "update_epochs": 4,
        }
    )
    curves = CurveRecorder(no_log)
    train_policy(section, policy_files, 0, curves)
    assert curves.rows[1]["rewards/letters"] < 0.4
    assert curves.rows[24]["rewards/letters"] > 0.6


def test_with_an_adapter_the_reference_is_the_base_and_the_saved_model_is_merged(params, policy_files):
    adapter = AdapterParams(rank=2, alpha=4, dropout=0.0, target_modules="all-linear", quantise=None)
    section = params.model_copy(update={"adapter": adapter, "learning_rate": 0.01})
    models, tokenizer, rollout = start(section, policy_files)
    assert models.reference is None
    learn(section, models, rollout)
    with torch.no_grad():
        after = token_log_probs(models.reference_logits(rollout.batch), rollout.batch.responses, section.temperature)
        logits = response_logits(models.policy, rollout.batch)
        moved = token_log_probs(logits, rollout.batch.responses, section.temperature)
    torch.testing.assert_close(after, rollout.reference_log_probs)
    assert not torch.allclose(moved, rollout.log_probs)
    merged = finished_policy(models.policy, section, policy_files.sft, tokenizer)
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("values", [[None] * 8, [float("nan")] * 8, [1.0] * 7])
def test_a_broken_reward_ends_in_a_sentence(params, policy_files, monkeypatch, values):
    reward = Reward("broken", lambda prompts, completions, **columns: values, 1.0)
    monkeypatch.setattr(algorithm, "build_rewards", lambda *_: [reward])
    with pytest.raises(UserError, match="broken"):
        train_policy(params, policy_files, 0, no_log)
