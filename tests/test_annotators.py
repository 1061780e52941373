"""Several votes on a pair: agreement by hand, aggregation that finds the truth, and rows made of votes."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf.data.annotators import (
    AGGREGATES,
    VoteMethod,
    Votes,
    aggregate_votes,
    describe_agreement,
    krippendorff_alpha,
    majority,
    mirrored,
    pairwise_agreement,
)
from rlhf.data.formats import Row

METHODS: tuple[VoteMethod, ...] = ("majority", "dawid_skene", "mace")


def make_votes(*by_annotator: list[int | None]) -> Votes:
    """One list of verdicts per annotator, a place per pair, None where there was no vote."""
    listed = [
        (pair, annotator, verdict)
        for annotator, verdicts in enumerate(by_annotator)
        for pair, verdict in enumerate(verdicts)
        if verdict is not None
    ]
    return Votes(*np.array(listed).T)


def simulate(pairs: int, skills: list[float], seed: int) -> tuple[Votes, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 2, pairs)
    is_right = generator.random((len(skills), pairs)) < np.array(skills)[:, None]
    return make_votes(*np.where(is_right, truth, 1 - truth).tolist()), truth


def test_alpha_of_the_published_example() -> None:
    """Krippendorff (2011), section B: two observers, ten units, binary.

    Four units are disagreed on, so each side has an off-diagonal coincidence of 4; 14 values are 0 and 6 are 1:
    alpha = 1 − 19 · 4 / (14 · 6) = 0.095.
    """
    votes = make_votes([0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0])
    assert krippendorff_alpha(votes) == pytest.approx(1 - 19 * 4 / (14 * 6))
    assert round(krippendorff_alpha(votes) or 0, 3) == 0.095
    assert pairwise_agreement(votes) == pytest.approx(0.6)


def test_alpha_with_missing_votes_by_hand() -> None:
    """Units {1, 1, 0}, {0, 0}, {1}: the last says nothing; o = 2 · 1 / 2 = 1, n₁ = 2, n₀ = 3: 1 − 4 · 1 / 6."""
    votes = make_votes([1, 0, 1], [1, 0, None], [0, None, None])
    assert krippendorff_alpha(votes) == pytest.approx(1 / 3)
    assert pairwise_agreement(votes) == pytest.approx(2 / 4)  # of the four couples, one of three and one of one agree


def test_agreement_where_there_is_nothing_to_compare() -> None:
    assert krippendorff_alpha(make_votes([1, 1], [1, 1])) is None
    assert pairwise_agreement(make_votes([1, 0])) is None
    assert krippendorff_alpha(make_votes([1, 0], [1, 0])) == 1.0
    assert describe_agreement(Votes(*np.zeros((3, 0), dtype=int)))["pairwise_agreement"] is None


def test_agreement_does_not_depend_on_which_answer_comes_first() -> None:
    votes, _ = simulate(60, [0.9, 0.8, 0.6], seed=1)
    turned = np.arange(60) % 3 == 0
    other = Votes(votes.pairs, votes.annotators, np.where(turned[votes.pairs], 1 - votes.verdicts, votes.verdicts))
    assert describe_agreement(votes) == pytest.approx(describe_agreement(other))
    assert krippendorff_alpha(votes) != pytest.approx(krippendorff_alpha(other))
    assert krippendorff_alpha(mirrored(votes)) == pytest.approx(krippendorff_alpha(mirrored(other)))


def test_majority_shares() -> None:
    assert majority(make_votes([1, 0, 1], [1, 1, None], [0, None, None])).tolist() == pytest.approx([2 / 3, 0.5, 1.0])


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_deterministic_and_turn_with_the_pairs(method: VoteMethod) -> None:
    votes, _ = simulate(80, [0.9, 0.8, 0.7, 0.6], seed=2)
    chances = AGGREGATES[method](votes)
    assert chances.shape == (80,)
    assert ((chances >= 0) & (chances <= 1)).all()
    assert np.array_equal(chances, AGGREGATES[method](votes))
    turned = np.arange(80) % 2 == 0
    other = Votes(votes.pairs, votes.annotators, np.where(turned[votes.pairs], 1 - votes.verdicts, votes.verdicts))
    # MACE starts from random numbers, so that the way there, though not the end, depends on the side.
    assert np.allclose(
        AGGREGATES[method](other), np.where(turned, 1 - chances, chances), atol=1e-6 if method != "mace" else 0.05
    )


@pytest.mark.parametrize("method", ["dawid_skene", "mace"])
def test_one_expert_outvotes_three_who_guess(method: VoteMethod) -> None:
    votes, truth = simulate(400, [0.97, 0.8, 0.55, 0.55, 0.55], seed=3)
    by_majority = ((majority(votes) > 0.5) == truth).mean()
    by_method = ((AGGREGATES[method](votes) > 0.5) == truth).mean()
    assert by_majority < 0.85
    assert by_method > 0.92


def vote(annotator: str | None, chosen: str, rejected: str, **columns: object) -> Row:
    return {"prompt": "p", "chosen": chosen, "rejected": rejected, "annotator": annotator, **columns}


def test_votes_become_one_row_where_the_first_stood() -> None:
    rows = [
        vote("x", "c", "d"),
        vote("a", "bad", "good", truth_flipped=True, source_id="7", reason="short"),
        {"prompt": "q", "chosen": "e", "rejected": "f"},
        vote("b", "good", "bad", truth_flipped=False, source_id="7", reason="kind"),
        vote("c", "good", "bad", truth_flipped=False, source_id="7", reason="true"),
    ]
    made, figures = aggregate_votes(rows, "majority")
    assert made == [
        rows[0],
        {
            "prompt": "p",
            "chosen": "good",
            "rejected": "bad",
            "truth_flipped": False,
            "source_id": "7",
            "votes": 3,
            "agreement": pytest.approx(2 / 3),
            "confidence": pytest.approx(2 / 3),
        },
        rows[2],
    ]
    assert (figures["pairs"], figures["votes"], figures["annotators"], figures["ties"]) == (1, 3, 3, 0)
    assert figures["pairwise_agreement"] == pytest.approx(1 / 3)


def test_ties_are_left_out_and_counted() -> None:
    made, figures = aggregate_votes([vote("a", "x", "y"), vote("b", "y", "x"), vote("a", "u", "v")], "majority")
    assert (made, figures["ties"]) == ([vote("a", "u", "v")], 1)


def test_an_annotator_has_one_vote_and_broken_rows_pass() -> None:
    broken = [vote("a", "x", "y") | {"chosen": None}, vote(None, "x", "y")]
    rows = [vote("a", "x", "y"), vote("a", "x", "y"), vote("b", "y", "x"), *broken]
    made, figures = aggregate_votes(rows, "majority")
    assert (made, figures["votes"], figures["ties"]) == (broken, 2, 1)


def test_answers_of_messages_and_no_votes_at_all() -> None:
    first, second = [{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "y"}]
    rows = [vote(name, "", "") | {"chosen": first, "rejected": second} for name in "ab"]
    assert [row["chosen"] for row in aggregate_votes(rows, "mace")[0]] == [first]
    assert aggregate_votes([], "mace")[0] == []
    assert aggregate_votes([vote("a", "x", "y")], "dawid_skene")[0] == [vote("a", "x", "y")]


def test_a_pair_decided_against_all_its_votes_is_turned_round() -> None:
    """A troll who is always wrong, alone with another troll on one pair: Dawid and Skene believe neither."""
    rows = [
        {"prompt": f"q{n}", "chosen": right, "rejected": wrong, "annotator": name}
        for n in range(40)
        for name, (right, wrong) in {
            **dict.fromkeys("abcd", ("good", "bad")),
            "troll": ("bad", "good"),
            "ogre": ("bad", "good"),
        }.items()
    ]
    last = [vote(name, "bad", "good", truth_flipped=True, margin=2.0) for name in ("troll", "ogre")]
    made, _ = aggregate_votes([*rows, *last], "dawid_skene")
    assert (made[-1]["chosen"], made[-1]["truth_flipped"], made[-1]["agreement"]) == ("good", False, 0.0)
    assert "margin" not in made[-1]
    trusted, _ = aggregate_votes([*rows, vote("a", "x", "y"), vote("troll", "y", "x")], "dawid_skene")
    assert (trusted[-1]["chosen"], trusted[-1]["votes"], trusted[-1].get("annotator")) == ("x", 2, None)
