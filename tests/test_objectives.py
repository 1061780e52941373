"""The mathematics of policy gradients against numbers derived by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.policies.objectives import (
    adapted_beta,
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    exact_kl,
    generalised_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    masked_mean,
    token_log_probs,
    token_rewards,
    whiten,
)

ONES = torch.ones(1, 3)


def test_advantages_by_hand():
    """r = (0, 0, 1), V = (.5, .6, .7), γ = 1, λ = .5: δ = (.1, .1, .3), A₂ = .3, A₁ = .1 + .15, A₀ = .1 + .125."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    advantages = generalised_advantages(rewards, values, ONES, gamma=1.0, gae_lambda=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.225, 0.25, 0.3]]))


def test_advantages_with_lambda_one_are_returns_minus_values():
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.3, -0.2, 0.9]])
    advantages = generalised_advantages(rewards, values, ONES, gamma=0.5, gae_lambda=1.0)
    returns = torch.tensor([[1 + 0.5 * 2 + 0.25 * 3, 2 + 0.5 * 3, 3.0]])
    torch.testing.assert_close(advantages, returns - values)


@given(st.integers(1, 5), st.integers(0, 4), st.floats(0, 1), st.floats(0, 1))
def test_padding_does_not_move_advantages(length, padding, gamma, gae_lambda):
    generator = torch.Generator().manual_seed(length)
    rewards, values = torch.randn(1, length, generator=generator), torch.randn(1, length, generator=generator)
    alone = generalised_advantages(rewards, values, torch.ones(1, length), gamma, gae_lambda)
    noise = torch.full((1, padding), 1e6)
    mask = torch.cat([torch.ones(1, length), torch.zeros(1, padding)], 1)
    padded = generalised_advantages(
        torch.cat([rewards, 0 * noise], 1), torch.cat([values, noise], 1), mask, gamma, gae_lambda
    )
    torch.testing.assert_close(padded[:, :length], alone)
    assert not padded[:, length:].any()


def test_policy_loss_by_hand():
    """Ratios (1.5, .5) with A = (1, −1), ε = .2: min(1.5, 1.2) = 1.2 and min(−.5, −.8) = −.8; mean .2, negated."""
    log_ratio = torch.tensor([[math.log(1.5), math.log(0.5)]])
    loss = clipped_policy_loss(log_ratio, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), (0.2, 0.2), None)
    assert loss.item() == pytest.approx(-0.2)


def test_a_higher_clip_lets_good_tokens_rise_further():
    """Ratio 1.5, A = 1: ε_high = .4 gives 1.4 where .2 gives 1.2; with A = −1 the upper clip never counts."""
    log_ratio = torch.tensor([[math.log(1.5)]])
    for advantage, high, expected in [(1.0, 0.2, 1.2), (1.0, 0.4, 1.4), (-1.0, 0.2, -1.5), (-1.0, 0.4, -1.5)]:
        loss = clipped_policy_loss(log_ratio, torch.tensor([[advantage]]), torch.ones(1, 1), (0.2, high), None)
        assert loss.item() == pytest.approx(-expected)


def test_the_dual_clip_bounds_what_a_bad_token_costs():
    """Ratio 10, A = −1: −10 without, −3 with c = 3, and no gradient beyond; a good token is as without."""
    log_ratio = torch.tensor([[math.log(10.0), math.log(2.0), math.log(10.0)]], requires_grad=True)
    advantages = torch.tensor([[-1.0, -1.0, 1.0]])
    loss = clipped_policy_loss(log_ratio, advantages, ONES, (0.2, 0.2), 3.0)
    loss.backward()
    assert loss.item() == pytest.approx((3 + 2 - 1.2) / 3)
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad, torch.tensor([[0.0, 2 / 3, 0.0]]))


def test_group_advantages_by_hand():
    """Scores (1, 2, 3) and (5, 5, 5): deviations 1 and 0, so (−1, 0, 1) but for 10⁻⁴, and nothing."""
    advantages = group_advantages(torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0]), 3)
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]), atol=2e-4, rtol=0)


def test_leave_one_out_by_hand():
    """Scores (1, 2, 6): 1 − 4, 2 − 3.5 and 6 − 1.5."""
    advantages = leave_one_out_advantages(torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), 3)
    torch.testing.assert_close(advantages, torch.tensor([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]))


def test_beta_follows_the_kl():
    """KL 10 % above its target moves β up by .1 · share; far off, by .2 · share and no more; on target, not at all."""
    assert adapted_beta(0.5, 6.6, 6.0, 0.1) == pytest.approx(0.5 * 1.01)
    assert adapted_beta(0.5, 60.0, 6.0, 0.1) == pytest.approx(0.5 * 1.02)
    assert adapted_beta(0.5, -1.0, 6.0, 0.1) == pytest.approx(0.5 * 0.98)
    assert adapted_beta(0.5, 6.0, 6.0, 0.1) == 0.5


def test_the_exact_divergence_is_what_k1_comes_to_on_average():
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 3, 7, generator=generator), torch.randn(2, 3, 7, generator=generator)
    p, q = (logits / 0.7).log_softmax(-1), (reference / 0.7).log_softmax(-1)
    torch.testing.assert_close(exact_kl(logits, reference, 0.7), (p.exp() * kl_estimate(p, q, "k1")).sum(-1))


def test_the_gradient_of_k1_in_a_loss_vanishes_and_that_of_k2_is_the_divergence_s():
    """Why k1 is refused in the loss: over samples of π, E ∇d = E ∇ log π = 0, but E ∇(d²/2) = ∇ KL."""
    logits, reference = torch.tensor([0.3, -0.2, 1.0], requires_grad=True), torch.tensor([1.0, 0.5, -0.5])

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    def sampled(estimator):
        log_probs = logits.log_softmax(-1)
        return (log_probs.detach().exp() * kl_estimate(log_probs, reference.log_softmax(-1), estimator)).sum()

    exact = gradient(exact_kl(logits, reference, 1.0))
    torch.testing.assert_close(gradient(sampled("k1")), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(sampled("k2")), exact)
    assert exact.abs().max() > 0.1


def test_padding_cannot_overflow_the_ratio():
    log_ratio = torch.tensor([[0.0, 1e4]], requires_grad=True)
    loss = clipped_policy_loss(log_ratio, torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), (0.2, 0.2), None)
    loss.backward()
    assert loss.item() == pytest.approx(-1.0)
    assert log_ratio.grad is not None
    assert log_ratio.grad.isfinite().all()


def test_value_loss_by_hand():
    """V = 1, V_old = 0, G = 1, clip .2: unclipped error 0, clipped (.2 − 1)² = .64; half of the worse is .32."""
    loss = clipped_value_loss(torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), 0.2)
    assert loss.item() == pytest.approx(0.32)


def test_score_falls_on_the_last_response_token():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), torch.ones(2, 3), mask, beta=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.5, 9.5, 0.0], [-0.5, -0.5, 19.5]]))


def test_kl_estimators_by_hand():
    """d = log π − log π_ref = ln 2: k1 = ln 2, k2 = ln² 2 / 2, k3 = ½ − 1 + ln 2."""
    pair = torch.tensor([[math.log(2.0)]]), torch.zeros(1, 1)
    assert kl_estimate(*pair, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(*pair, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(*pair, "k3").item() == pytest.approx(math.log(2) - 0.5)


def test_k1_and_k3_estimate_the_exact_divergence():
    """Both are unbiased: averaged over samples of p they come to Σ p log(p/q)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        expected = (p * kl_estimate(p.log(), q.log(), estimator)).sum()
        torch.testing.assert_close(expected, exact)


def test_log_probs_and_entropy_agree_with_torch():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 1, 2], [4, 3, 2]])
    expected = torch.distributions.Categorical(logits=logits / 0.7)
    torch.testing.assert_close(token_log_probs(logits, tokens, 0.7), expected.log_prob(tokens))
    torch.testing.assert_close(entropy(logits, 0.7), expected.entropy())


def test_whitened_tokens_have_mean_zero_and_deviation_one():
    values = torch.tensor([[1.0, 2.0, 99.0], [3.0, 6.0, -99.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    white = whiten(values, mask)
    assert masked_mean(white, mask).item() == pytest.approx(0, abs=1e-6)
    assert masked_mean(white.square(), mask).item() == pytest.approx(1, abs=1e-5)
    assert not white[:, 2].any()
