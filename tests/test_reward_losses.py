"""The reward model's objectives: values by hand, and the cases in which one is another."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from rlhf import reward_losses
from rlhf.reward_losses import OBJECTIVES, RewardBatch
from tests.tiny import make_transport


def make_batch(margins: list[float], **changes: object) -> RewardBatch:
    size = len(margins)
    labels = torch.arange(size, dtype=torch.float64) % 2 * 2 - 1
    batch = RewardBatch(
        points=torch.arange(2.0 * size, dtype=torch.float64).reshape(size, 2),
        logits=labels * torch.tensor(margins, dtype=torch.float64),
        labels=labels,
        mass=1.0,
        noise_rate=0.2,
        doubt=torch.zeros(size),
        believed=torch.ones(size, dtype=torch.bool),
        transport=make_transport(),
    )
    return replace(batch, **changes)


def loss_of(name: str, batch: RewardBatch) -> float:
    return OBJECTIVES[name](batch)[0].item()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bradley_terry", math.log(1 + math.exp(-2))),
        ("label_smoothing", 0.8 * math.log(1 + math.exp(-2)) + 0.2 * math.log(1 + math.exp(2))),
        ("unbiased", (0.8 * math.log(1 + math.exp(-2)) - 0.2 * math.log(1 + math.exp(2))) / 0.6),
        ("symmetric", 1 / (1 + math.exp(2))),
        ("gce", (1 - (1 / (1 + math.exp(-2))) ** 0.7) / 0.7),
    ],
)
def test_a_margin_of_two_by_hand(name: str, expected: float) -> None:
    assert loss_of(name, make_batch([2.0, 2.0])) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["label_smoothing", "unbiased", "trimmed", "cleanlab", "gce"])
def test_without_noise_it_is_bradley_terry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_losses, "GCE_EXPONENT", 1e-6)
    batch = make_batch([-1.0, 0.5, 3.0], noise_rate=0.0)
    assert loss_of(name, batch) == pytest.approx(loss_of("bradley_terry", batch), rel=1e-4)


def test_the_unbiased_loss_is_right_on_average_over_flips() -> None:
    right, wrong = (loss_of("unbiased", make_batch([margin])) for margin in (1.5, -1.5))
    assert 0.8 * right + 0.2 * wrong == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_trimming_keeps_the_smallest_losses() -> None:
    batch = make_batch([3.0, -4.0, 1.0, 2.0], mass=0.5)
    loss, kept = OBJECTIVES["trimmed"](batch)
    assert kept.tolist() == [1, 0, 0, 1]
    assert loss.item() == pytest.approx(softplus(-batch.margins[[0, 3]]).mean().item())


def test_a_lead_is_wanted_of_the_margin() -> None:
    batch = make_batch([2.0, 2.0], leads=torch.tensor([0.5, 3.0]))
    expected = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(1.0))) / 2
    assert loss_of("bradley_terry", batch) == pytest.approx(expected)


def test_of_two_models_each_learns_what_the_other_loses_least_on() -> None:
    batch = make_batch([3.0, -4.0, 1.0, 2.0], mass=0.5)
    peer_margins = torch.tensor([-1.0, 2.0, 5.0, -3.0], dtype=torch.float64)
    loss, kept = OBJECTIVES["co_teaching"](replace(batch, peer_logits=batch.labels * peer_margins))
    assert kept.tolist() == [0, 1, 1, 0]
    expected = softplus(-batch.margins[[1, 2]]).mean() + softplus(-peer_margins[[0, 3]]).mean()
    assert loss.item() == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="pass peer_logits"):
        OBJECTIVES["co_teaching"](replace(batch, peer_logits=None))


def test_labels_not_believed_do_not_count() -> None:
    batch = make_batch([3.0, -4.0], believed=torch.tensor([False, True]))
    loss, kept = OBJECTIVES["cleanlab"](batch)
    assert kept.tolist() == [0, 1]
    assert loss.item() == pytest.approx(math.log(1 + math.exp(4)))
    nothing = OBJECTIVES["cleanlab"](make_batch([3.0], believed=torch.tensor([False])))[0]
    assert nothing.item() == 0


def test_full_transport_leaves_out_nothing() -> None:
    batch = make_batch([3.0, -4.0, 1.0, 2.0], mass=0.5)
    assert OBJECTIVES["full_transport"](batch)[1].tolist() == pytest.approx([1.0] * 4)
    assert OBJECTIVES["selective_plain"](batch)[1].sum().item() == pytest.approx(2.0)


def test_doubt_decides_which_label_is_left_out_and_no_more() -> None:
    batch = make_batch([1.0, 1.0, 1.0, 1.0], mass=0.75)
    assert loss_of("selective", batch) == pytest.approx(loss_of("selective_plain", batch))
    doubted = replace(batch, doubt=torch.tensor([0.0, 0.0, 9.0, 0.0]))
    loss, kept = OBJECTIVES["selective"](doubted)
    assert kept.tolist() == pytest.approx([1, 1, 0, 1])
    assert loss.item() < 9
    assert not torch.equal(kept, OBJECTIVES["selective_plain"](doubted)[1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_pulls_a_margin_up_and_tells_what_it_used(name: str) -> None:
    margins = torch.tensor([0.5, -0.5, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    batch = make_batch([0.0] * 4, mass=0.75)
    batch = replace(batch, logits=batch.labels * margins, peer_logits=batch.labels)
    loss, kept = OBJECTIVES[name](batch)
    loss.backward()
    assert margins.grad is not None
    assert margins.grad.sum() < 0
    assert kept.shape == (4,)
    assert not kept.requires_grad
    assert kept.max() <= 1 + 1e-6
    assert kept.min() >= 0


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_gradients_stay_finite_for_scores_far_apart(name: str, margin: float) -> None:
    margins = torch.full((4,), margin, requires_grad=True)
    batch = make_batch([0.0] * 4, mass=0.75)
    OBJECTIVES[name](replace(batch, logits=batch.labels * margins, peer_logits=batch.labels))[0].backward()
    assert margins.grad is not None
    assert margins.grad.isfinite().all()
