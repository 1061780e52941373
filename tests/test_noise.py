"""The noise estimate on data whose noise is known."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf.errors import UserError
from rlhf.noise import estimate_from_agreement, estimate_noise_rate, orient_pairs, predict_out_of_fold


def make_differences(rate: float, pairs: int = 1200, dimensions: int = 8) -> np.ndarray:
    """Chosen minus rejected: the better answer lies along the first axis; a share `rate` is turned around."""
    generator = np.random.default_rng(0)
    differences = generator.normal(size=(pairs, dimensions))
    differences[:, 0] = np.abs(differences[:, 0]) + 0.5
    wrong = generator.random(pairs) < rate
    return np.where(wrong[:, None], -differences, differences)


def name_groups(pairs: int, size: int = 2) -> list[str]:
    return [f"prompt {row // size}" for row in range(pairs)]


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_estimate_is_near_the_true_rate_and_inside_its_interval(rate: float) -> None:
    features, labels = orient_pairs(make_differences(rate), seed=1)
    estimate = estimate_noise_rate(features, labels, name_groups(len(labels)), seed=1)
    assert estimate.rate == pytest.approx(rate, abs=0.04)
    assert estimate.low <= estimate.rate <= estimate.high
    assert estimate == estimate_noise_rate(features, labels, name_groups(len(labels)), seed=1)


def test_orientation_turns_pairs_around_and_keeps_what_they_say() -> None:
    differences = make_differences(0.0)
    oriented, labels = orient_pairs(differences, seed=3)
    np.testing.assert_array_equal(np.where(labels[:, None] == 1, oriented, -oriented), differences)
    assert 0.4 < labels.mean() < 0.6


def test_no_prompt_stands_on_both_sides_of_a_fold() -> None:
    """Random features, one label per prompt: only a leak could beat chance."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(60, 20)) * 5
    groups = np.repeat(np.arange(60), 10)
    labels = np.repeat(generator.integers(0, 2, 60), 10)
    features = centres[groups] + generator.normal(size=(600, 20))
    guesses = predict_out_of_fold(features, labels, [str(group) for group in groups])
    assert np.mean(guesses.argmax(1) == labels) < 0.65


def test_labels_turned_around_are_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.noise._confident_rate", lambda _labels, _probabilities: 0.5)
    features, labels = orient_pairs(make_differences(0.2), seed=0)
    with pytest.raises(UserError, match=r"is 0\.50, not below 0\.5.*set reward\.noise_rate to a number"):
        estimate_noise_rate(features, labels, name_groups(len(labels)), seed=0)


@pytest.mark.parametrize(
    ("features", "labels", "groups", "message"),
    [
        (np.zeros((6, 2)), np.array([0, 1] * 3), list("abcdef"), "6 labels of 6 prompts are too few"),
        (np.zeros((100, 2)), np.array([0, 1] * 50), ["a"] * 100, "of 1 prompts are too few"),
        (np.full((100, 2), np.nan), np.array([0, 1] * 50), name_groups(100), "not finite"),
    ],
)
def test_unusable_input_is_refused(features: np.ndarray, labels: np.ndarray, groups: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        estimate_noise_rate(features, labels, groups, seed=0)


def test_agreement_by_hand() -> None:
    """Of two votes each on ten comparisons eight agree: (1-e)² + e² = 0.8."""
    places = [number for number in range(10) for _ in range(2)]
    ways = [side for number in range(10) for side in (True, number >= 2)]
    estimate = estimate_from_agreement(places, ways, seed=0)
    assert estimate.rate == pytest.approx((1 - 0.6**0.5) / 2)
    assert estimate.low < estimate.rate < estimate.high


def test_agreement_finds_the_rate_of_annotators_that_err_at_random() -> None:
    generator = np.random.default_rng(1)
    truth = generator.random(2000) < 0.5
    places = np.repeat(np.arange(2000), 3)
    ways = truth[places] ^ (generator.random(6000) < 0.2)
    estimate = estimate_from_agreement(places.tolist(), ways.tolist(), seed=0)
    assert estimate.low < 0.2 < estimate.high
    assert estimate.high - estimate.low < 0.04


def test_annotators_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UserError, match="none of the 3 comparisons has two votes"):
        estimate_from_agreement([1, 2, 3], [True] * 3, seed=0)
    with pytest.raises(UserError, match=r"agree on 0\.00 of their common comparisons, no more than coins"):
        estimate_from_agreement([1, 1], [True, False], seed=0)
