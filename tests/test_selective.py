"""Properties of the selective loss, and the cases in which it is known in closed form."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, softplus

import rlhf.selective
from rlhf.selective import mass_schedule, orient_batch, selective_loss
from rlhf.transport import entropic_plan, transport_plan
from tests.tiny import make_transport


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    transport = make_transport(label_weight=label_weight)
    return selective_loss(*orient_batch(differences, margins, generator), mass, transport, doubt)


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
    ("points", "logits", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4), "do not fit"),
        (torch.zeros(3), torch.zeros(3), "do not fit"),
        (torch.zeros(3, 2), torch.full((3,), math.nan), "lower its learning rate"),
    ],
)
def test_bad_loss_input_is_refused_with_a_remedy(points: torch.Tensor, logits: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_loss(points, logits, torch.ones(3), 0.5, make_transport())


# The costs and what steers the plan -----------------------------------------------------------------

FORBIDDEN = 1e3
POINTS = {
    "far": draw(0, 9, 3),
    "equal": torch.ones(9, 3, dtype=torch.float64),
    "zero": torch.zeros(9, 3, dtype=torch.float64),
    "twins": torch.cat([draw(0, 8, 3)[[0, 0, 0, 1, 1, 2, 3, 4]], torch.zeros(1, 3)]),
    "nearly equal": 1 + 1e-12 * draw(0, 9, 3),
    "one outlier": torch.cat([1e-9 * draw(0, 8, 3), torch.full((1, 3), 1e6)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("points", POINTS.values(), ids=POINTS)
@pytest.mark.parametrize("semantic_cost", ["squared_euclidean", "cosine"])
@pytest.mark.parametrize("scale", ["max", "median", "local"])
def test_every_variant_keeps_the_mass_with_finite_gradients(
    points: torch.Tensor, semantic_cost: str, scale: str, dtype: torch.dtype
) -> None:
    logits = torch.tensor([500.0, -500.0, 0.0, 1.0, -1.0, 2.0, 0.1, 30.0, -3.0], dtype=dtype, requires_grad=True)
    labels = torch.tensor([1, 1, -1, 1, -1, -1, 1, 1, -1], dtype=dtype)
    variants = ({}, {"self_match_penalty": 1.0}, {"neighbours": 2}, {"regularisation": 0.1})
    for label_cost, variant in itertools.product(("cross_entropy", "absolute", "symmetric"), variants):
        transport = make_transport(semantic_cost=semantic_cost, scale=scale, label_cost=label_cost, **variant)
        loss, kept = selective_loss(points.to(dtype), logits, labels, 0.7, transport)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        assert gradient.isfinite().all()
        assert kept.sum().item() == pytest.approx(0.7 * 9, abs=1e-5)
        assert kept.min() >= 0
        assert kept.max() <= 1 + 1e-5


def mean_distance(points: list[list[float]], **changes: Any) -> float:
    """Mean S of the cheapest plan that moves every label to another point; all predictions are undecided."""
    size = len(points)
    transport = make_transport(label_weight=1.0, self_match_penalty=FORBIDDEN, **changes)
    loss, _ = selective_loss(torch.tensor(points), torch.zeros(size), torch.ones(size), 1.0, transport)
    return loss.item() - math.log(2)


def test_distances_by_hand() -> None:
    """On a line at 0, 1, 3 the squares are 1, 4, 9; the only ways around all three points use each of them."""
    line = [[0.0], [1.0], [3.0]]
    assert mean_distance(line) == pytest.approx((1 + 4 + 9) / 9 / 3)
    assert mean_distance(line, scale="median") == pytest.approx((1 + 4 + 9) / 4 / 3)
    # Fewer than seven neighbours, so each point's own scale is the farthest: 9, 4, 9.
    assert mean_distance(line, scale="local") == pytest.approx((1 / 6 + 4 / 6 + 9 / 9) / 3, rel=1e-5)
    angles = [[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]]
    assert mean_distance(angles, semantic_cost="cosine") == pytest.approx((1 / 2 + 1 / 2 + 2 / 2) / 3)


def test_the_local_scale_sees_dense_and_sparse_regions_alike() -> None:
    """Twenty points, and the same ten times as far apart a long way off: matches within either cost the same."""
    region = draw(4, 20, 3)
    alone = mean_distance(region.tolist(), scale="local")
    both = torch.cat([region, 10 * region + 1e3]).tolist()
    assert mean_distance(both, scale="local") == pytest.approx(alone, rel=1e-3)
    assert mean_distance(both, scale="max") < alone / 1e3


@pytest.mark.parametrize("margin", [-3.0, 0.5])
def test_label_costs_by_hand(margin: float) -> None:
    """A lone prediction is matched with its own label: the loss is L, whatever the match's penalty."""
    cross, absolute = math.log(1 + math.exp(-margin)), 1 / (1 + math.exp(margin))
    for name, expected in (("cross_entropy", cross), ("absolute", absolute), ("symmetric", cross + 4 * absolute)):
        transport = make_transport(label_cost=name, self_match_penalty=5.0)
        loss, _ = selective_loss(torch.ones(1, 2), torch.tensor([-margin]), torch.tensor([-1.0]), 1.0, transport)
        assert loss.item() == pytest.approx(expected)


def test_the_absolute_cost_lets_go_of_hopeless_labels() -> None:
    logits = torch.tensor([-20.0], dtype=torch.float64, requires_grad=True)
    loss, _ = selective_loss(
        torch.ones(1, 2).double(), logits, torch.ones(1), 1.0, make_transport(label_cost="absolute")
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert -1e-6 < gradient.item() < 0


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The plans that losses are made with."""
    made: list[torch.Tensor] = []

    def solve(cost: torch.Tensor, mass: float) -> torch.Tensor:
        made.append(transport_plan(cost, mass))
        return made[-1]

    monkeypatch.setattr(rlhf.selective, "transport_plan", solve)
    return made


def solve_random(seed: int, size: int, mass: float, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    labels = draw(seed, size).sign()
    return selective_loss(draw(seed + 1, size, 3), draw(seed + 2, size), labels, mass, make_transport(**changes))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [2, 3, 11])
@pytest.mark.parametrize("mass", [0.3, 0.77, 1.0])
def test_a_forbidden_self_match_never_happens(plans: list[torch.Tensor], seed: int, size: int, mass: float) -> None:
    solve_random(seed, size, mass, self_match_penalty=FORBIDDEN)
    assert plans[0].diagonal().abs().max() == 0


def test_a_dearer_self_match_is_rarer(plans: list[torch.Tensor]) -> None:
    for penalty in (0.0, 0.01, 0.03, 0.1):
        solve_random(0, 40, 0.8, self_match_penalty=penalty)
    shares = [plan.diagonal().sum().item() for plan in plans]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[1] > shares[-1]


@pytest.mark.parametrize("mass", [0.4, 0.9, 1.0])
@pytest.mark.parametrize("penalty", [0.0, FORBIDDEN])
def test_labels_go_to_near_neighbours_only(plans: list[torch.Tensor], mass: float, penalty: float) -> None:
    for seed in range(5):
        solve_random(seed, 12, mass, neighbours=3, self_match_penalty=penalty)
        points = draw(seed + 1, 12, 3)
        for row, column in plans[seed].nonzero().tolist():
            nearer = (points - points[row]).square().sum(1) < (points[column] - points[row]).square().sum()
            assert nearer.sum() <= 3  # the point itself, and at most two others


def test_a_forbidden_self_match_happens_where_no_neighbour_is_left(plans: list[torch.Tensor]) -> None:
    """Points at 0, 1 and 10, one neighbour: the third may only take the second's label, which the first needs."""
    points, transport = torch.tensor([[0.0], [1.0], [10.0]]), make_transport(neighbours=1, self_match_penalty=FORBIDDEN)
    selective_loss(points, torch.zeros(3), torch.ones(3), 1.0, transport)
    selective_loss(points, torch.zeros(3), torch.ones(3), 2 / 3, transport)
    assert plans[0].mul(3).round().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert plans[1].mul(3).round().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_as_many_neighbours_as_points_are_all() -> None:
    assert solve_random(0, 8, 0.7, neighbours=7)[0] == solve_random(0, 8, 0.7)[0]


def test_a_small_regularisation_gives_the_exact_loss() -> None:
    exact, kept = solve_random(0, 24, 0.75)
    smooth, smooth_kept = solve_random(0, 24, 0.75, regularisation=1e-4)
    assert smooth.item() == pytest.approx(exact.item(), abs=1e-3)
    torch.testing.assert_close(smooth_kept, kept, atol=0.05, rtol=0)
    assert solve_random(0, 24, 0.75, regularisation=0.5)[0].item() > exact.item() + 0.01


def test_the_gradient_of_a_regularised_loss_is_that_of_the_regularised_optimum() -> None:
    points, labels = draw(5, 6, 3), draw(6, 6).sign()
    semantic = torch.cdist(points, points).square()
    semantic = semantic / semantic.max()

    def optimum(logits: torch.Tensor) -> float:
        cost = semantic + softplus(-labels * logits[:, None])
        plan = entropic_plan(cost, 0.7, 0.3, tolerance=1e-10)
        return ((plan * cost).sum() + 0.3 * (plan * plan.log()).sum()).item() / 0.7

    logits = draw(7, 6).requires_grad_()
    transport = make_transport(label_weight=1.0, regularisation=0.3)
    (gradient,) = torch.autograd.grad(selective_loss(points, logits, labels, 0.7, transport)[0], logits)
    for i, shift in enumerate(1e-4 * torch.eye(6, dtype=torch.float64)):
        slope = (optimum(logits.detach() + shift) - optimum(logits.detach() - shift)) / 2e-4
        assert gradient[i].item() == pytest.approx(slope, abs=1e-3)
