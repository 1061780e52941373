"""PPO: invariants of one step on a tiny model, and a policy that learns something it can be seen to learn."""

import gc
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.curves import CurveRecorder, no_log
from rlhf.data.formats import training_rows, write_rows
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer, save_model
from rlhf.params import AdapterParams, AdaptiveBeta
from rlhf.params_file import load_params
from rlhf.policies import ppo as algorithm
from rlhf.policies import rollout as rollouts_module
from rlhf.policies import train_policy
from rlhf.policies.actors import Batch, ValueHead, load_models, response_logits
from rlhf.policies.advantages import Adaptive, estimate, settle_scores
from rlhf.policies.objectives import exact_kl, token_log_probs
from rlhf.policies.rollout import judge, prompt_batches, roll_out
from rlhf.policies.updates import Optimiser
from rlhf.scoring import Reward
from rlhf.training import finished_policy
from tests.tiny import share_of_letters

ROOT = Path(__file__).parent.parent
ADAPTER = AdapterParams(rank=2, alpha=4, dropout=0.0, target_modules="all-linear", quantise=None)


@pytest.fixture
def params():
    section = load_params(ROOT / "params.yaml").policies["ppo"]
    return section.model_copy(
        update={"steps": 2, "batch_size": 8, "minibatches": 2, "max_new_tokens": 6, "temperature": 0.8}
    )


def with_(params, **changes):
    return params.model_copy(update=changes)


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
    monkeypatch.setattr(Optimiser, "_step", lambda self: steps.append(1) or {})
    section = params.model_copy(update={"update_epochs": 4, "minibatches": 4, "gradient_accumulation_steps": 2})
    models, _, rollout = start(section, policy_files)
    learn(section, models, rollout)
    assert len(steps) == 16


def test_no_gradient_is_longer_than_its_limit(params, policy_files, monkeypatch):
    section = params.model_copy(update={"max_grad_norm": 0.01})
    models, _, rollout = start(section, policy_files)
    found = []

    def look(adam):
        for group in adam.param_groups:
            found.append(torch.stack([value.grad.norm() for value in group["params"] if value.grad is not None]).norm())

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    figures = learn(section, models, rollout)
    assert figures["policy/grad_norm"] > 0.02  # the limit had something to do
    assert len(found) == 4 and max(found) < 0.01001


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
    section = with_(params, adapter=ADAPTER, learning_rate=0.01)
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


# rewards and advantages ---------------------------------------------------------------------------


def test_each_prompt_is_answered_by_its_group():
    batches = prompt_batches([{"prompt": str(index)} for index in range(6)], 8, 4, 0)
    groups = [[row["prompt"] for row in batch][place : place + 4] for batch in islice(batches, 3) for place in (0, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert sorted(group[0] for group in groups) == [str(index) for index in range(6)]


def test_without_values_gae_with_lambda_one_is_the_reward_to_go(params, policy_files):
    _, _, rollout = start(params, policy_files)  # a fresh critic says zero
    scores = torch.linspace(-1, 1, 8)
    with_critic = estimate(with_(params, gae_lambda=1.0), rollout, scores, 0.1)
    rollout.values = None
    plain = estimate(with_(params, advantage="reward"), rollout, scores, 0.1)
    torch.testing.assert_close(plain.advantages, with_critic.advantages)
    assert plain.returns is None


def test_with_the_leash_in_the_loss_every_token_is_credited_with_its_answer_s_score(params, policy_files):
    section = with_(params, advantage="reward", whiten_advantages=False, kl_in="loss", kl_estimator="k2")
    _, _, rollout = start(section, policy_files)
    rollout.kl += 1.0
    scores = torch.linspace(-1, 1, 8)
    advantages = estimate(section, rollout, scores, 0.1).advantages
    torch.testing.assert_close(advantages, scores.unsqueeze(1) * rollout.batch.mask)


def test_leave_one_out_weighs_the_score_against_the_kl_of_the_answer(params, policy_files):
    section = with_(params, advantage="leave_one_out", group_size=2, whiten_advantages=False)
    _, _, rollout = start(section, policy_files)
    rollout.kl = torch.ones_like(rollout.kl)
    scores = torch.linspace(-1, 1, 8)
    totals = scores - 0.1 * rollout.batch.mask.sum(1)
    advantages = estimate(section, rollout, scores, 0.1).advantages
    torch.testing.assert_close(advantages[0, 0], totals[0] - totals[1])
    torch.testing.assert_close(advantages[1, 0], totals[1] - totals[0])


def test_the_likelihood_of_an_answer_is_held_against_its_group_s(params, policy_files):
    """A = L − β·KL minus the group's mean, whatever the rewards; L the answer's log-probability in nats."""
    section = with_(params, advantage="likelihood", group_size=4, whiten_advantages=False)
    _, _, rollout = start(section, policy_files)
    rollout.kl = torch.ones_like(rollout.kl)
    mask = rollout.batch.mask
    aims = (rollout.log_probs * mask).sum(1) - 0.1 * mask.sum(1)
    expected = torch.cat([part - part.mean() for part in aims.split(4)])
    for scores in (torch.zeros(8), torch.linspace(-9, 9, 8)):
        experience = estimate(section, rollout, scores, 0.1)
        torch.testing.assert_close(experience.advantages, expected.unsqueeze(1) * mask)
        assert torch.equal(experience.scores, scores)


def test_learning_from_likelihood_sharpens(params, policy_files):
    changes = {"advantage": "likelihood", "group_size": 8, "batch_size": 32, "steps": 12, "learning_rate": 0.02}
    curves = CurveRecorder(no_log)
    train_policy(with_(params, **changes, beta=0.0, temperature=1.0), policy_files, 0, curves)
    assert curves.rows[12]["objective/entropy"] < curves.rows[1]["objective/entropy"] - 0.2


@pytest.mark.parametrize("advantage", ["group", "leave_one_out", "reward", "likelihood"])
def test_without_gae_there_is_no_critic(params, policy_files, advantage):
    section = with_(params, advantage=advantage, group_size=4, kl_in="loss", kl_estimator="k3")
    assert load_models(section, policy_files).critic is None
    curves = CurveRecorder(no_log)
    model = train_policy(section, policy_files, 0, curves)
    assert not torch.equal(weights(model), weights(load_causal(policy_files.sft)))
    assert not [name for name in curves.rows[2] if "critic" in name or "value" in name]
    assert all(torch.isfinite(torch.tensor(value)) for row in curves.rows.values() for value in row.values())


def test_equal_rewards_in_every_group_teach_nothing_and_are_counted(params, policy_files, monkeypatch):
    monkeypatch.setattr(algorithm, "build_rewards", lambda *_: [Reward("same", lambda p, c, **_: [1.0] * len(p), 1.0)])
    section = with_(params, advantage="group", group_size=4, beta=0.0, missing_eos_penalty=0.0)
    curves = CurveRecorder(no_log)
    model = train_policy(section, policy_files, 0, curves)
    assert torch.equal(weights(model), weights(load_causal(policy_files.sft)))
    assert curves.rows[2]["frac_reward_zero_std"] == 1.0


def test_the_running_deviation_is_that_of_all_scores_so_far(params):
    section, adaptive = with_(params, score_scaling="running", score_clip=None), Adaptive(params.beta)
    batches = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 4 + 7
    for batch in batches:
        scores = settle_scores(section, batch, torch.ones(8, dtype=torch.bool), adaptive)
    assert adaptive.deviation == pytest.approx(batches.std(correction=0).item(), rel=1e-5)
    torch.testing.assert_close(scores, batches[-1] / adaptive.deviation)


def test_scaled_scores_of_equal_answers_stay_finite(params):
    for scaling, expected in (("whiten", 0.0), ("running", 3.0), ("none", 3.0)):
        section = with_(params, score_scaling=scaling)
        scores = settle_scores(section, torch.full((8,), 3.0), torch.ones(8, dtype=torch.bool), Adaptive(0.1))
        assert scores.tolist() == [expected] * 8


def test_beta_rises_while_the_kl_is_too_large(params):
    section = with_(params, adaptive_beta=AdaptiveBeta(target=2.0, horizon=80), batch_size=8)
    adaptive = Adaptive(0.5)
    assert adaptive.follow(section, 9.0) == {"objective/beta": 0.5}
    assert adaptive.beta == pytest.approx(0.5 * 1.02)
    assert Adaptive(0.5).follow(params, 9.0) == {}


def test_truncated_answers_take_no_part(params, policy_files):
    section = with_(params, mask_truncated=True, kl_in="loss", kl_estimator="k3")
    models, _, rollout = start(section, policy_files)
    before = weights(models.policy)
    rollout.ended = torch.zeros(8, dtype=torch.bool)
    figures = learn(section, models, rollout)
    assert torch.equal(weights(models.policy), before)
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values())
    rollout.ended = torch.tensor([True, False] * 4)
    mask = estimate(section, rollout, torch.zeros(8), 0.1).mask
    assert torch.equal(mask, rollout.batch.mask * torch.tensor([[1.0], [0.0]] * 4))


# leash --------------------------------------------------------------------------------------------


def test_few_rows_at_a_time_give_what_all_give_at_once(params, policy_files, monkeypatch):
    section = with_(params, kl_estimator="full")
    models, tokenizer, whole = start(section, policy_files)
    learn(with_(section, learning_rate=0.01), models, whole)
    rollouts = []
    for limit in (2**24, 1):
        monkeypatch.setattr(rollouts_module, "MAX_LOGITS", limit)
        torch.manual_seed(1)
        rollouts.append(roll_out(section, models, tokenizer, whole.rows))
    for name in ("log_probs", "reference_log_probs", "kl", "entropy", "values"):
        torch.testing.assert_close(getattr(rollouts[0], name), getattr(rollouts[1], name))
    with torch.no_grad():
        logits = response_logits(models.policy, rollouts[0].batch)
        expected = exact_kl(logits, models.reference_logits(rollouts[0].batch), section.temperature)
    torch.testing.assert_close(rollouts[0].kl, expected)
    assert (expected * rollouts[0].batch.mask).sum() > 0


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_a_leash_in_the_loss_holds(params, policy_files, estimator):
    distances = []
    for beta in (0.0, 20.0):
        section = with_(
            params,
            beta=beta,
            kl_in="loss",
            kl_estimator=estimator,
            update_epochs=6,
            clip_range=0.9,
            learning_rate=0.003,
        )
        models, _, rollout = start(section, policy_files)
        learn(section, models, rollout)
        with torch.no_grad():
            logits = response_logits(models.policy, rollout.batch)
            kl = exact_kl(logits, models.reference_logits(rollout.batch), 1.0)
        distances.append((kl * rollout.batch.mask).sum().item())
    assert distances[1] < 0.5 * distances[0]


def test_updates_stop_where_the_policy_has_gone_far_enough(params, policy_files):
    section = with_(params, update_epochs=4, learning_rate=0.01, target_kl=1e-9)
    models, _, rollout = start(section, policy_files)
    torch.manual_seed(3)
    experience = estimate(section, rollout, torch.linspace(-1, 1, 8), section.beta)
    optimiser = Optimiser(section, models)
    figures = optimiser.update(rollout, experience, section.beta)
    assert figures["policy/updates"] == 1
    assert optimiser.schedule.last_epoch == 8  # the learning rate falls as if all had been taken
    stopped = weights(models.policy)
    models, _, rollout = start(section, policy_files)
    assert learn(with_(section, target_kl=1e9), models, rollout)["policy/updates"] == 8
    assert not torch.equal(weights(models.policy), stopped)


@pytest.mark.parametrize(("critic", "adapter"), [("separate", None), ("shared", None), ("separate", ADAPTER)])
def test_recomputed_layers_give_the_same_gradient(params, policy_files, critic, adapter):
    """With `gradient_checkpointing` each layer runs twice per gradient step, and the policy ends at the same place."""
    ends, runs = [], []
    for recompute in (False, True):
        section = with_(params, critic=critic, adapter=adapter, gradient_checkpointing=recompute)
        models, _, rollout = start(section, policy_files)
        calls = []
        norm = models.policy.get_submodule(("base_model.model." if adapter else "") + "model.layers.0.input_layernorm")
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        learn(section, models, rollout)
        ends.append(weights(models.policy))
        runs.append(len(calls))
    assert runs == [2, 4]
    assert torch.equal(ends[0], ends[1])


# critics ------------------------------------------------------------------------------------------

CRITICS = [("shared", None), ("shared", ADAPTER), ("adapter", ADAPTER)]


@pytest.mark.parametrize(("critic", "adapter"), CRITICS)
def test_a_critic_on_the_policy_s_transformer_changes_no_log_prob(params, policy_files, critic, adapter):
    section = with_(params, critic=critic, adapter=adapter)
    models, _, rollout = start(section, policy_files)
    assert isinstance(models.critic, ValueHead)
    assert not rollout.values.any()
    torch.nn.init.ones_(models.critic.linear.weight)
    torch.nn.init.ones_(models.critic.linear.bias)
    with torch.no_grad():
        logits, values = models.read(rollout.batch)
        expected = response_logits(models.policy, rollout.batch)
        states = load_causal(policy_files.sft).model(
            input_ids=rollout.batch.tokens, attention_mask=rollout.batch.attention, position_ids=rollout.batch.positions
        )
    assert torch.equal(logits, expected)
    by_hand = states.last_hidden_state[:, rollout.batch.prompt_length - 1 : -1].sum(-1) + 1
    mask = rollout.batch.mask
    torch.testing.assert_close(values * mask, by_hand * mask, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("critic", "adapter"), CRITICS)
def test_such_a_critic_learns_and_the_saved_policy_is_a_plain_language_model(
    params, policy_files, tmp_path, critic, adapter
):
    section = with_(params, critic=critic, adapter=adapter, critic_learning_rate=0.05, learning_rate=0.01, steps=4)
    section = with_(section, precision="bf16" if adapter else "fp32")
    curves = CurveRecorder(no_log)
    model = train_policy(section, policy_files, 0, curves)
    assert curves.rows[4]["critic/explained_variance"] != curves.rows[1]["critic/explained_variance"]
    save_model(model, load_tokenizer(policy_files.sft), tmp_path)
    names = {name for name, _ in load_causal(tmp_path).named_parameters()}
    assert names == {name for name, _ in load_causal(policy_files.sft).named_parameters()}
    assert sorted(path.suffix for path in tmp_path.iterdir() if "safetensors" in path.name) == [".safetensors"]


def test_a_critic_s_adapter_leaves_policy_and_base_alone(params, policy_files):
    """The value loss moves the critic's adapter and head only: the policy ends where it does without that loss."""

    def flat(models):
        groups = {"policy adapter": [], "critic adapter": [], "critic head": []}
        for part, own in models.trained().items():
            for name, value in own.items():
                groups[f"{part} {'adapter' if 'lora_' in name else 'head'}"].append(value.detach().flatten())
        return {name: torch.cat(values) for name, values in groups.items()}

    ends = []
    for coefficient in (0.0, 0.5):
        section = with_(
            params, critic="adapter", adapter=ADAPTER, value_coefficient=coefficient, critic_learning_rate=0.01,
            kl_in="loss", kl_estimator="full", update_epochs=3,
        )  # fmt: skip
        models, _, rollout = start(section, policy_files)
        before = flat(models)
        learn(section, models, rollout)
        after = flat(models)
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert moved == ["policy adapter", "critic adapter", "critic head"][: 3 if coefficient else 1]
        ends.append(after)
        with torch.no_grad():
            logits = models.reference_logits(rollout.batch)
        reference = token_log_probs(logits, rollout.batch.responses, section.temperature)
        torch.testing.assert_close(reference, rollout.reference_log_probs)
    assert torch.equal(ends[0]["policy adapter"], ends[1]["policy adapter"])


# time and memory ----------------------------------------------------------------------------------


def large_tensors(size):
    """The tensors that are alive and hold so many numbers."""
    return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and thing.numel() >= size}


def test_no_distribution_over_the_vocabulary_outlives_a_rollout(params, policy_files):
    models, tokenizer, rollout = start(params, policy_files)
    size = rollout.batch.responses.numel() * models.policy.config.vocab_size
    before = large_tensors(size)
    rollout = roll_out(params, models, tokenizer, rollout.rows)
    assert large_tensors(size) <= before
    assert rollout.log_probs.shape == rollout.batch.responses.shape


def test_no_rollout_waits_for_the_garbage_collector(params, policy_files, monkeypatch):
    calls, seen = [], {}
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *arguments: calls.append(1) or collect(*arguments))
    train_policy(params, policy_files, 0, lambda _, step: seen.update({step: len(calls)}))
    assert seen[1] == seen[2]


def test_short_answers_are_not_padded_to_the_longest_of_their_minibatch(params, policy_files):
    """Parts hold answers of similar length, so that the columns computed are about those that the answers need."""
    section = with_(params, minibatches=1, gradient_accumulation_steps=4, max_new_tokens=60)
    models, tokenizer, rollout = start(section, policy_files)
    batch = rollout.batch
    for row in range(0, 8, 2):  # every other answer ends at its second token
        batch.attention[row, batch.prompt_length + 2 :] = 0
    columns = []
    models.policy.register_forward_pre_hook(
        lambda _, __, settings: columns.append(settings["input_ids"].numel()), with_kwargs=True
    )
    learn(section, models, rollout)
    assert sum(columns) < 1.1 * batch.attention.sum()


# prompts ------------------------------------------------------------------------------------------


def test_padding_that_no_row_of_a_minibatch_needs_is_cut(params, policy_files):
    _, _, rollout = start(params, policy_files)
    batch = rollout.batch
    wide = Batch(
        torch.cat([torch.zeros(8, 11, dtype=torch.long), batch.tokens], 1),
        torch.cat([torch.zeros(8, 11, dtype=torch.long), batch.attention], 1),
        batch.prompt_length + 11,
    )
    cut = wide.rows(torch.arange(8))
    assert cut.prompt_length == batch.prompt_length + 3
    assert torch.equal(cut.responses, batch.responses)
    assert torch.equal(cut.positions[:, 3:], batch.positions)


def test_conversations_and_texts_are_answered_side_by_side(params, policy_files):
    """Rewards are called as TRL calls them: lists beside the prompts, and messages for messages."""
    models, tokenizer, _ = start(params, policy_files)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{"id": "1", "prompt": "What is 2 + 3?", "answer": "5"}]
    rows += [{"id": "2", "prompt": [{"role": "user", "content": "What is 2 + 3?"}], "answer": "5"}]
    rollout = roll_out(params, models, tokenizer, rows)
    seen = {}

    def look(prompts, completions, answer, **columns):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [0.0, 1.0]

    scores, _ = judge(rollout, tokenizer, [Reward("look", look, 1.0)])
    assert scores.tolist() == [0.0, 1.0]
    assert seen["prompts"] == [row["prompt"] for row in rows] and seen["answer"] == ["5", "5"]
    assert isinstance(seen["completions"][0], str)
    assert [message["role"] for message in seen["completions"][1]] == ["assistant"]


def test_what_cannot_be_trained_is_refused_before_the_first_rollout(params, policy_files, tmp_path, monkeypatch):
    monkeypatch.setattr(algorithm, "roll_out", lambda *_: pytest.fail("a rollout was made"))

    def refused(sentence, files=policy_files, **changes):
        with pytest.raises(UserError, match=sentence) as caught:
            train_policy(with_(params, **changes), files, 0, no_log)
        assert "\n" not in str(caught.value)

    first = training_rows(policy_files.prompts)[0]["id"]
    refused(
        rf"row {first} of prompts is \d+ tokens long, the model reads 128 tokens and max_new_tokens is 120",
        max_new_tokens=120,
    )
    modules = ADAPTER.model_copy(update={"target_modules": ["attention_out"]})
    refused(r"adapter.target_modules is \['attention_out'\], which does not fit the model", adapter=modules)
    write_rows(tmp_path / "none.jsonl", [])
    refused("ppo has no prompts to answer", files=replace(policy_files, prompts=tmp_path / "none.jsonl"))
    two = AutoModelForSequenceClassification.from_pretrained(
        policy_files.reward, num_labels=2, ignore_mismatched_sizes=True
    )
    save_model(two, load_tokenizer(policy_files.reward), tmp_path / "two")
    refused("has 2 labels, not 1", files=replace(policy_files, reward=tmp_path / "two"))
