"""Labels judged by all labels but their own: what is found, what needs groups or answers, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rlhf import trust
from rlhf.errors import UserError
from rlhf.strengths import Design, fit_strengths, leave_each_out
from rlhf.trust import trust_labels

PAIRS, DIMENSIONS = 400, 8


def make_pairs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Differences (pairs, dimensions) whose truly better answer has the larger first coordinate, and answer numbers."""
    generator = np.random.default_rng(seed)
    differences = generator.normal(size=(PAIRS, DIMENSIONS))
    differences[:, 0] = np.abs(differences[:, 0])
    return differences, np.arange(2 * PAIRS).reshape(-1, 2)


def flip(differences: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    return differences * np.where(wrong, -1.0, 1.0)[:, None]


@pytest.mark.parametrize("noise_rate", [0.1, 0.3])
def test_wrong_labels_are_found_and_their_number_is_about_right(noise_rate: float) -> None:
    differences, answers = make_pairs()
    wrong = np.random.default_rng(1).random(PAIRS) < noise_rate
    found = trust_labels(flip(differences, wrong), answers, noise_rate, 0)
    assert roc_auc_score(wrong, 1 - found.right) > 0.85
    assert (1 - found.right).mean() == pytest.approx(noise_rate, abs=0.05)
    assert found.doubt.min() == 0
    assert (found.doubt > 0).tolist() == (found.right < 0.5).tolist()


@pytest.mark.parametrize("most", [trust.MOST_DIMENSIONS, 6])
def test_looks_tell_what_embeddings_cannot(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the embedding has more dimensions than are kept."""
    monkeypatch.setattr(trust, "MOST_DIMENSIONS", most)
    looks, answers = make_pairs()
    wrong = np.random.default_rng(1).random(PAIRS) < 0.2
    blind = np.random.default_rng(2).normal(size=(PAIRS, 20))
    without = trust_labels(blind, answers, 0.2, 0)
    found = trust_labels(blind, answers, 0.2, 0, surface=flip(looks[:, :1], wrong))
    assert roc_auc_score(wrong, 1 - without.right) < 0.65
    assert roc_auc_score(wrong, 1 - found.right) > 0.85


def test_a_label_is_judged_by_all_but_itself() -> None:
    """Turning labels around turns their margins around, though each pulled at the model before and after."""
    differences, answers = make_pairs()
    differences = flip(differences, np.random.default_rng(1).random(PAIRS) < 0.2)
    for pair in (3, 50, 200):
        turned = flip(differences, np.arange(PAIRS) == pair)
        before, after = (leave_out(one, answers)[pair] for one in (differences, turned))
        assert after == pytest.approx(-before, rel=0.1, abs=0.02)


def leave_out(differences: np.ndarray, answers: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    design = Design(differences, trust._incidence(answers))
    wrong, counted = np.full(PAIRS, 0.2), np.ones(PAIRS) if counted is None else counted
    prior = design.precision(2.0, 0.5)
    return leave_each_out(design, prior, wrong, counted, fit_strengths(design, prior, wrong, counted))


def test_close_calls_leave_sure_labels_alone_and_as_many_are_wrong_as_the_rate_says() -> None:
    """Votes that follow Bradley-Terry: wrong ones are close calls, and no large margin is contradicted."""
    generator = np.random.default_rng(0)
    differences = generator.normal(size=(2000, 4))
    margins = 4 * differences[:, 0]
    chosen = generator.random(2000) < 1 / (1 + np.exp(-margins))
    wrong = chosen != (margins > 0)
    labelled = flip(differences, ~chosen)
    found = trust_labels(labelled, np.arange(4000).reshape(-1, 2), float(wrong.mean()), 0)
    assert (1 - found.right).mean() == pytest.approx(wrong.mean(), abs=1e-6)
    sure = found.right > 0.95
    assert wrong[sure].mean() == pytest.approx((1 - found.right)[sure].mean(), abs=0.02)
    assert found.again[np.abs(margins) > 6].max() > 0.97


def test_other_halves_of_the_labels_say_how_firm_a_verdict_is() -> None:
    differences, answers = make_pairs()
    wrong = np.random.default_rng(1).random(PAIRS) < 0.2
    found = trust_labels(flip(differences, wrong), answers, 0.2, 0)
    assert set(np.round(found.called_wrong * trust.REPETITIONS, 6)) <= set(range(trust.REPETITIONS + 1))
    assert roc_auc_score(wrong, found.called_wrong) > 0.8


def test_a_group_that_is_wrong_as_a_whole_is_found_by_the_other_groups() -> None:
    """The flipped topic has a feature of its own, by which a model of all pairs believes it."""
    differences, answers = make_pairs()
    topic = np.arange(PAIRS) // 40
    differences = np.hstack([differences, np.eye(10)[topic] * differences[:, :1] * 3])
    wrong = topic == 3
    names = [f"topic {number}" for number in topic]
    alone = trust_labels(flip(differences, wrong), answers, 0.1, 0)
    grouped = trust_labels(flip(differences, wrong), answers, 0.1, 0, names)
    assert roc_auc_score(wrong, 1 - alone.right) < 0.7
    assert roc_auc_score(wrong, 1 - grouped.right) > 0.95
    assert grouped.rates["topic 3"] > 0.7
    assert {rate for name, rate in grouped.rates.items() if name != "topic 3"} == {0.1}


def test_answers_in_several_pairs_have_a_strength_that_no_embedding_shows() -> None:
    generator = np.random.default_rng(0)
    strength = generator.permutation(40)
    answers = np.array([generator.choice(40, 2, replace=False) for _ in range(PAIRS)])
    answers = np.where((strength[answers[:, 0]] > strength[answers[:, 1]])[:, None], answers, answers[:, ::-1])
    wrong = generator.random(PAIRS) < 0.2
    answers = np.where(wrong[:, None], answers[:, ::-1], answers)
    differences = generator.normal(size=(PAIRS, DIMENSIONS))
    found = trust_labels(differences, answers, 0.2, 0)
    unknown = trust_labels(differences, np.arange(2 * PAIRS).reshape(-1, 2), 0.2, 0)
    assert roc_auc_score(wrong, 1 - found.right) > 0.8
    assert roc_auc_score(wrong, 1 - unknown.right) < 0.65


def test_many_dimensions_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    differences, answers = make_pairs()
    wrong = np.random.default_rng(1).random(PAIRS) < 0.2
    whole = trust_labels(flip(differences, wrong), answers, 0.2, 0)
    monkeypatch.setattr(trust, "MOST_DIMENSIONS", DIMENSIONS - 1)
    reduced = trust_labels(flip(differences, wrong), answers, 0.2, 0)
    assert not np.array_equal(whole.right, reduced.right)
    assert roc_auc_score(wrong, 1 - reduced.right) > 0.6
    np.testing.assert_array_equal(reduced.right, trust_labels(flip(differences, wrong), answers, 0.2, 0).right)


def test_embeddings_that_say_nothing_leave_the_noise_rate(caplog: pytest.LogCaptureFixture) -> None:
    _, answers = make_pairs()
    np.testing.assert_allclose(trust_labels(np.zeros((PAIRS, 3)), answers, 0.2, 0).right, 0.8)
    assert trust_labels(np.ones((PAIRS, 3)), answers, 0.0, 0).right.tolist() == [1.0] * PAIRS
    assert trust_labels(np.ones((4, 3)), answers[:4], 0.2, 0).right.tolist() == [0.8] * 4
    assert "4 labels are too few" in caplog.text


@pytest.mark.parametrize(
    ("value", "noise_rate", "message"),
    [(np.nan, 0.2, "not finite; check the model"), (1.0, 0.5, "noise rate is 0.5"), (1.0, -0.1, "noise rate is -0.1")],
)
def test_bad_input_is_refused(value: float, noise_rate: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trust_labels(np.full((10, 2), value), np.arange(20).reshape(-1, 2), noise_rate, 0)
