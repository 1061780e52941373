"""Properties of the transport plans, exact and entropic, and agreement with independent solvers."""

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

import rlhf.transport
from rlhf.transport import entropic_plan, transport_plan


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_feasible(plan: torch.Tensor, mass: float, tolerance: float) -> None:
    rows, columns = plan.shape
    assert (plan >= 0).all()
    assert (plan.sum(1) <= 1 / rows + tolerance).all()
    assert (plan.sum(0) <= 1 / columns + tolerance).all()
    assert plan.sum().item() == pytest.approx(mass, abs=tolerance)


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
    check_feasible(plan, mass, 1e-9)
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
        (torch.zeros(2, 2, 2), 0.5, r"shape \(2, 2, 2\); pass one matrix"),
        (torch.zeros(0, 3), 0.5, r"shape \(0, 3\)"),
        (torch.zeros(2, 2, dtype=torch.int64), 0.5, "torch.int64"),
        (np.zeros((2, 2)), 0.5, "ndarray"),
    ],
)
def test_bad_plan_input_is_refused_with_a_remedy(cost: torch.Tensor, mass: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transport_plan(cost, mass)


def test_doctests() -> None:
    assert doctest.testmod(rlhf.transport).failed == 0


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), SHAPES, st.floats(0.01, 1), st.floats(-2.5, 1), st.booleans())
def test_entropic_plans_are_feasible(
    seed: int, shape: tuple[int, int, int], mass: float, exponent: float, is_double: bool
) -> None:
    cost = draw(seed, *shape).to(torch.float64 if is_double else torch.float32)
    plans = entropic_plan(cost, mass, 10**exponent)
    assert plans.dtype == cost.dtype
    for plan in plans:
        check_feasible(plan, mass, 1e-9 if is_double else 1e-6)


@pytest.mark.parametrize("regularisation", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(9, 9), (6, 11)])
def test_entropic_plan_agrees_with_pot(regularisation: float, mass: float, shape: tuple[int, int]) -> None:
    cost = draw(3, *shape).abs()
    masses = (np.full(size, 1 / size) for size in shape)
    expected = ot.partial.entropic_partial_wasserstein(
        *masses, cost.numpy(), regularisation, m=mass - 1e-12, numItermax=20_000, stopThr=1e-14
    )
    plan = entropic_plan(cost, mass, regularisation, tolerance=1e-9, max_iterations=20_000)
    torch.testing.assert_close(plan, torch.from_numpy(np.asarray(expected)), atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 24), st.integers(1, 24), st.sampled_from([0.1, 0.01, 0.001]))
def test_a_small_regularisation_gives_the_exact_cost(seed: int, size: int, count: int, regularisation: float) -> None:
    """At the regularised optimum at most ε m log(B / m) more: so much more entropy than the exact plan it can have."""
    mass = min(count, size) / size
    cost = torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plan = entropic_plan(cost, mass, regularisation, tolerance=1e-4)
    gap = ((plan - transport_plan(cost, mass)) * cost).sum().item()
    assert -1e-9 <= gap <= regularisation * mass * math.log(size / mass) + 2e-4


def test_a_harder_problem_settles(caplog: pytest.LogCaptureFixture) -> None:
    """Distances in few dimensions, no match with oneself, all mass: alternating level, rows, columns did not settle."""
    points = draw(1, 64, 4)
    cost = torch.cdist(points, points).square()
    cost = cost / cost.max() + 10 * torch.eye(64)
    plan = entropic_plan(cost, 1.0, 0.002)
    assert not caplog.records
    assert plan.diagonal().sum() < 1e-3
    gap = ((plan - transport_plan(cost, 1.0)) * cost).sum().item()
    assert 0 <= gap < 0.002 * math.log(64)


def test_equal_costs_spread_the_mass_evenly() -> None:
    plan = entropic_plan(torch.full((4, 5), 3.0), 0.6, 0.01)
    torch.testing.assert_close(plan, torch.full((4, 5), 0.03))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched_plans_equal_single_ones(dtype: torch.dtype) -> None:
    cost = (draw(2, 2, 3, 8, 8) * torch.tensor([0.1, 1.0, 5.0])[:, None, None]).to(dtype)
    plans = entropic_plan(cost, 0.7, 0.02)
    assert plans.shape == cost.shape
    for index in itertools.product(range(2), range(3)):
        torch.testing.assert_close(plans[index], entropic_plan(cost[index], 0.7, 0.02))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_entropic_plan_keeps_the_dtype_has_no_gradient_and_is_repeatable(dtype: torch.dtype) -> None:
    cost = draw(1, 6, 6).to(dtype).requires_grad_()
    plan = entropic_plan(cost, 0.5, 0.1)
    assert plan.dtype == dtype
    assert not plan.requires_grad
    assert torch.equal(plan, entropic_plan(cost, 0.5, 0.1))


def test_what_has_not_settled_is_solved_exactly_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    hard, easy = draw(1, 8, 8), torch.zeros(8, 8, dtype=torch.float64)
    plans = entropic_plan(torch.stack([hard, easy]), 0.75, 0.01, max_iterations=2)
    torch.testing.assert_close(plans[0], transport_plan(hard, 0.75))
    torch.testing.assert_close(plans[1], torch.full_like(easy, 0.75 / 64))
    assert "1 of 2 plans of regularisation 0.01 have not settled in 2 iterations" in caplog.text


@pytest.mark.parametrize(
    ("cost", "mass", "regularisation", "message"),
    [
        (torch.zeros(2, 2), 0.0, 0.1, "mass is 0.0"),
        (torch.zeros(2, 2), 1.1, 0.1, "mass is 1.1"),
        (torch.zeros(2, 2), 0.5, 0.0, "regularisation is 0.0"),
        (torch.zeros(2, 2), 0.5, -1.0, "regularisation is -1.0"),
        (torch.zeros(2, 2), 0.5, math.nan, "regularisation is nan"),
        (torch.zeros(2, 2), 0.5, math.inf, "regularisation is inf"),
        (torch.tensor([[0.0, math.nan]]), 0.5, 0.1, "NaN or infinite"),
        (torch.zeros(3), 0.5, 0.1, r"shape \(3,\)"),
        (torch.zeros(0, 2, 2), 0.5, 0.1, r"shape \(0, 2, 2\)"),
        (torch.zeros(2, 2, dtype=torch.int64), 0.5, 0.1, "torch.int64"),
    ],
)
def test_bad_entropic_input_is_refused_with_a_remedy(
    cost: torch.Tensor, mass: float, regularisation: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        entropic_plan(cost, mass, regularisation)
