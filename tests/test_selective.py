"""Properties of the transport plan and of the selective loss, and the cases where both are known in closed form."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, softplus

import rlhf.selective
from rlhf.selective import mass_schedule, orient_batch, selective_loss, transport_plan


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pot_cost(cost: torch.Tensor, mass: float) -> float:
    rows, columns = cost.shape
    # POT wants costs that are not negative, and a mass no larger than the sums, which rounding puts just below 1.
    shifted = cost.numpy() - cost.min().item()
    row_masses, column_masses = np.full(rows, 1 / rows), np.full(columns, 1 / columns)
    available = min(mass, row_masses.sum(), column_masses.sum())
    plan = ot.partial.partial_wasserstein(row_masses, column_masses, shifted, m=available, nb_dummies=2)
    return float(np.sum(np.asarray(plan) * cost.numpy()))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.floats(0.01, 1))
def test_plan_is_feasible_and_as_cheap_as_pot(seed: int, rows: int, columns: int, mass: float) -> None:
    cost = draw(seed, rows, columns)
    plan = transport_plan(cost, mass)
    assert (plan >= 0).all()
    assert (plan.sum(1) <= 1 / rows + 1e-9).all()
    assert (plan.sum(0) <= 1 / columns + 1e-9).all()
    assert plan.sum().item() == pytest.approx(mass, abs=1e-9)
    assert (plan * cost).sum().item() == pytest.approx(pot_cost(cost, mass), abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 5), st.booleans(), st.data())
def test_plan_is_cheaper_than_every_choice_of_pairs(seed: int, size: int, has_ties: bool, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size))
    cost = draw(seed, size, size)
    cost = cost.round() if has_ties else cost
    best = min(
        sum(cost[i, j].item() for i, j in zip(rows, columns, strict=True))
        for rows in itertools.combinations(range(size), count)
        for columns in itertools.permutations(range(size), count)
    )
    plan = transport_plan(cost, count / size)
    assert (plan * cost).sum().item() * size == pytest.approx(best, abs=1e-9)
    assert set((plan * size).round(decimals=9).unique().tolist()) <= {0.0, 1.0}


def test_fractional_mass_mixes_the_two_whole_plans() -> None:
    """Four samples, m·B = 2.25: three quarters of the plan for two pairs, one quarter of that for three."""
    cost = draw(3, 4, 4)
    expected = 0.75 * transport_plan(cost, 0.5) + 0.25 * transport_plan(cost, 0.75)
    torch.testing.assert_close(transport_plan(cost, 2.25 / 4), expected)


def test_rounding_of_the_mass_does_not_make_a_plan_fractional() -> None:
    plan = transport_plan(draw(0, 10, 10), 0.1 + 0.2)
    assert ((plan * 10).round(decimals=6) % 1 == 0).all()
    assert plan.sum().item() == pytest.approx(0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_plan_keeps_the_dtype_has_no_gradient_and_is_repeatable(dtype: torch.dtype) -> None:
    cost = draw(1, 6, 6).to(dtype).requires_grad_()
    plan = transport_plan(cost, 0.5)
    assert plan.dtype == dtype
    assert not plan.requires_grad
    assert torch.equal(plan, transport_plan(cost, 0.5))


def test_equal_costs_still_transport_the_whole_mass() -> None:
    assert transport_plan(torch.zeros(5, 5), 0.6).sum().item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("cost", "mass", "message"),
    [
        (torch.zeros(2, 2), 0.0, "mass is 0.0"),
        (torch.zeros(2, 2), 1.1, "mass is 1.1"),
        (torch.zeros(2, 2), math.nan, "mass is nan"),
        (torch.tensor([[0.0, math.nan]]), 0.5, "NaN or infinite"),
        (torch.tensor([[0.0, math.inf]]), 0.5, "lower its learning rate"),
        (torch.zeros(3), 0.5, r"shape \(3,\)"),
        (torch.zeros(0, 3), 0.5, r"shape \(0, 3\)"),
        (torch.zeros(2, 2, dtype=torch.int64), 0.5, "torch.int64"),
        (np.zeros((2, 2)), 0.5, "ndarray"),
    ],
)
def test_bad_plan_input_is_refused_with_a_remedy(cost: torch.Tensor, mass: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transport_plan(cost, mass)


def test_doctests() -> None:
    assert doctest.testmod(rlhf.selective).failed == 0


@pytest.mark.parametrize(("epoch", "mass"), [(0, 1.0), (0.99, 1.0), (1, 1.0), (1.5, 0.85), (2, 0.7), (9, 0.7)])
def test_mass_ramps_from_one_to_the_clean_share(epoch: float, mass: float) -> None:
    assert mass_schedule(epoch, 1, 1, 0.3) == pytest.approx(mass)


def test_mass_drops_at_once_without_a_ramp() -> None:
    assert mass_schedule(0, 0, 0, 0.3) == pytest.approx(0.7)
    assert mass_schedule(0.9, 1, 0, 0.3) == 1.0


def pairwise_loss(
    differences: torch.Tensor,
    margins: torch.Tensor,
    mass: float,
    label_weight: float,
    generator: torch.Generator,
    doubt: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return selective_loss(*orient_batch(differences, margins, generator), mass, label_weight, doubt)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seed_with_equal_turns(size: int) -> int:
    """A seed whose orientations are all the same: then every pair carries the same label."""
    return next(s for s in range(10_000) if len(set(torch.randint(0, 2, (size,), generator=seeded(s)).tolist())) == 1)


@pytest.mark.parametrize("label_weight", [0.01, 1.0, 100.0])
def test_equal_labels_and_full_mass_give_bradley_terry(label_weight: float) -> None:
    """With equal labels L does not depend on the column: any full plan costs what the diagonal costs, S = 0 on it."""
    margins = draw(1, 6)
    loss, kept = pairwise_loss(draw(2, 6, 3), margins, 1.0, label_weight, seeded(seed_with_equal_turns(6)))
    assert loss.item() == pytest.approx(-logsigmoid(margins).mean().item(), abs=1e-8)
    torch.testing.assert_close(kept, torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("label_weight", [10.0, 1000.0])
def test_equal_labels_and_high_label_weight_trim_the_largest_losses(label_weight: float) -> None:
    margins = torch.tensor([3.0, -2.0, 1.0, 0.5, -4.0, 2.0], dtype=torch.float64)
    loss, kept = pairwise_loss(draw(2, 6, 3), margins, 4 / 6, label_weight, seeded(seed_with_equal_turns(6)))
    assert kept.round().tolist() == [1, 0, 1, 1, 0, 1]
    assert loss.item() == pytest.approx(softplus(-margins).sort().values[:4].mean().item(), abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_low_label_weight_trims_the_largest_losses_in_any_orientation(seed: int) -> None:
    """Where distance decides, every label is matched with its own prediction, and the worst of these are left out."""
    margins = draw(seed, 12)
    loss, kept = pairwise_loss(draw(seed + 50, 12, 4), margins, 0.75, 1e-4, seeded(seed))
    expected = softplus(-margins).sort().values[:9]
    assert loss.item() == pytest.approx(expected.mean().item(), abs=1e-8)
    assert set(torch.nonzero(kept < 0.5).flatten().tolist()) == set(margins.argsort()[:3].tolist())


def test_a_high_label_weight_sees_only_how_many_labels_of_each_kind_there_are() -> None:
    """Predictions that are the labels shifted by one: often wrong, yet as many of each kind as there are labels."""
    turns = torch.randint(0, 2, (12,), generator=seeded()).mul(2).sub(1).double()
    margins = 3 * turns * turns.roll(1)
    loss, _ = pairwise_loss(draw(1, 12, 4), margins, 1.0, 1e6, seeded())
    assert (margins < 0).any()
    assert loss.item() == pytest.approx(softplus(torch.tensor(-3.0)).item(), abs=1e-4)


def test_what_is_left_out_is_a_label_not_a_prediction() -> None:
    """Three predictions say 1, the second feebly; labels 1, 1, 0. The third prediction takes the second label."""
    wanted = [1, 1, 0]
    seed = next(s for s in range(1000) if torch.randint(0, 2, (3,), generator=seeded(s)).tolist() == wanted)
    margins = torch.tensor([3.0, 0.1, -3.0], dtype=torch.float64)
    _, kept = pairwise_loss(draw(1, 3, 4), margins, 2 / 3, 1e3, seeded(seed))
    assert kept.round(decimals=6).tolist() == [1, 1, 0]


def test_a_wrong_label_among_neighbours_that_agree_is_left_out() -> None:
    """Ten pairs of one kind, one of them labelled the other way round: its embedding and margin are reversed."""
    differences = torch.ones(10, 3, dtype=torch.float64) + 0.01 * draw(0, 10, 3)
    margins = torch.full((10,), 2.0, dtype=torch.float64)
    differences[4], margins[4] = -differences[4], -margins[4]
    _, kept = pairwise_loss(differences, margins, 0.9, 1.0, seeded(3))
    assert kept.argmin().item() == 4
    assert kept[4].item() == pytest.approx(0, abs=1e-9)


def test_gradient_agrees_with_finite_differences_of_the_solved_problem() -> None:
    differences = draw(5, 8, 3)
    margins = draw(6, 8).requires_grad_()
    loss, _ = pairwise_loss(differences, margins, 0.7, 0.5, seeded())
    (gradient,) = torch.autograd.grad(loss, margins)
    step = 1e-6
    for i in range(8):
        shift = torch.zeros(8, dtype=torch.float64)
        shift[i] = step
        above, _ = pairwise_loss(differences, margins.detach() + shift, 0.7, 0.5, seeded())
        below, _ = pairwise_loss(differences, margins.detach() - shift, 0.7, 0.5, seeded())
        assert gradient[i].item() == pytest.approx(((above - below) / (2 * step)).item(), abs=1e-6)


def test_embeddings_get_no_gradient_from_the_loss() -> None:
    differences, margins = draw(5, 4, 3).requires_grad_(), draw(6, 4).requires_grad_()
    pairwise_loss(differences, margins, 0.5, 1.0, seeded())[0].backward()
    assert differences.grad is None
    assert margins.grad is not None


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 16), st.floats(0.5, 1), st.floats(0.01, 100))
def test_kept_labels_add_up_to_the_mass(seed: int, size: int, mass: float, label_weight: float) -> None:
    loss, kept = pairwise_loss(draw(seed, size, 3), draw(seed + 1, size), mass, label_weight, seeded(seed))
    assert torch.isfinite(loss)
    assert kept.sum().item() == pytest.approx(mass * size)
    assert kept.min() >= 0
    assert kept.max() <= 1 + 1e-9


def test_doubts_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"doubt has shape \(3,\), logits \(2,\); pass one per sample"):
        pairwise_loss(torch.zeros(2, 2), torch.zeros(2), 0.5, 1.0, seeded(), torch.zeros(3))


def test_identical_embeddings_and_large_margins_stay_finite() -> None:
    loss, _ = pairwise_loss(torch.ones(4, 2), torch.tensor([500.0, -500.0, 0.0, 1.0]), 1.0, 1.0, seeded())
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("points", "logits", "weight", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4), 1.0, "do not fit"),
        (torch.zeros(3), torch.zeros(3), 1.0, "do not fit"),
        (torch.zeros(3, 2), torch.zeros(3), 0.0, "label_weight is 0"),
        (torch.zeros(3, 2), torch.full((3,), math.nan), 1.0, "lower its learning rate"),
    ],
)
def test_bad_loss_input_is_refused_with_a_remedy(
    points: torch.Tensor, logits: torch.Tensor, weight: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        selective_loss(points, logits, torch.ones(3), 0.5, weight)
