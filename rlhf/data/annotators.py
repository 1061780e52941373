"""Several votes on the same pair: how far annotators agree, and one row per pair made of their votes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.data.formats import Row
from rlhf.params import VoteMethod


@dataclass(frozen=True)
class Votes:
    """Arrays of shape (votes,): the pair and the annotator, each numbered from 0, and the verdict, 0 or 1."""

    pairs: np.ndarray
    annotators: np.ndarray
    verdicts: np.ndarray

    @property
    def per_pair(self) -> np.ndarray:
        """(pairs,) how many votes each has."""
        return np.bincount(self.pairs)


# agreement ----------------------------------------------------------------------------------------


def pairwise_agreement(votes: Votes) -> float | None:
    """The share of agreeing ones among all two votes on the same pair; None where no pair has two votes."""
    ones = np.bincount(votes.pairs, weights=votes.verdicts)
    counts = votes.per_pair
    couples = counts * (counts - 1)
    alike = ones * (ones - 1) + (counts - ones) * (counts - ones - 1)
    return float(alike.sum() / couples.sum()) if couples.sum() else None


def krippendorff_alpha(votes: Votes) -> float | None:
    r"""Krippendorff's alpha for nominal verdicts: 1 is full agreement, 0 what chance gives, below 0 systematic discord.

    Over the pairs u with m_u ≥ 2 votes, n_uc of them for c: observed disagreement o = Σ_u n_u0 n_u1 / (m_u − 1), and
    with n_c = Σ_u n_uc and n = n_0 + n_1, alpha = 1 − (n − 1) o / (n_0 n_1). It depends on which answer of a pair is
    called 0. None where every verdict is the same, as chance would agree then too.
    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section B and C.
    """
    counts = votes.per_pair
    ones = np.bincount(votes.pairs, weights=votes.verdicts)
    several = counts >= 2
    counts, ones = counts[several], ones[several]
    zeros = counts - ones
    if not ones.sum() or not zeros.sum():
        return None
    observed = (zeros * ones / (counts - 1)).sum()
    return float(1 - (counts.sum() - 1) * observed / (zeros.sum() * ones.sum()))


def describe_agreement(votes: Votes) -> dict[str, float | None]:
    """Pairs with several votes, their votes and annotators, and both figures of agreement; alpha with sides balanced.

    Which answer of a pair is called first says nothing, so alpha is taken of the votes and their mirror image.
    """
    pairs = len(votes.per_pair)
    return {
        "pairs": pairs,
        "votes": len(votes.pairs),
        "annotators": len(np.unique(votes.annotators)),
        "votes_per_pair": len(votes.pairs) / pairs if pairs else None,
        "pairwise_agreement": pairwise_agreement(votes) if pairs else None,
        "krippendorff_alpha": krippendorff_alpha(mirrored(votes)) if pairs else None,
    }


# aggregation --------------------------------------------------------------------------------------


def mirrored(votes: Votes) -> Votes:
    """Every vote twice: as it is, and with the two answers exchanged, as a vote of its annotator on another pair."""
    pairs = len(votes.per_pair)
    return Votes(
        np.concatenate([votes.pairs, votes.pairs + pairs]),
        np.concatenate([votes.annotators, votes.annotators]),
        np.concatenate([votes.verdicts, 1 - votes.verdicts]),
    )


def majority(votes: Votes) -> np.ndarray:
    """(pairs,) the share of votes for 1."""
    return np.bincount(votes.pairs, weights=votes.verdicts) / votes.per_pair


def dawid_skene(votes: Votes) -> np.ndarray:
    """(pairs,) the probability of 1 where every annotator is right with a probability of his or her own.

    Expectation maximisation from the majority's shares. Source: Dawid & Skene, Applied Statistics 28 (1979); mirrored
    votes make their matrix of errors symmetric and the two sides equally likely, so that the result does not depend
    on which answer is called 1.
    """
    from crowdkit.aggregation import DawidSkene

    return _posterior(DawidSkene(n_iter=100), votes)


def mace(votes: Votes) -> np.ndarray:
    """(pairs,) the probability of 1 where every annotator either knows the answer or votes by a habit.

    Variational inference. Source: Hovy et al., Learning Whom to Trust with MACE (NAACL 2013).
    """
    from crowdkit.aggregation import MACE

    # One start: crowd-kit draws every start from the same seed.
    return _posterior(MACE(n_restarts=1, n_iter=50, random_state=0), votes)


AGGREGATES: dict[VoteMethod, Callable[[Votes], np.ndarray]] = {
    "majority": majority,
    "dawid_skene": dawid_skene,
    "mace": mace,
}
"""From votes to the probability (for the majority, the share) of 1 per pair, by the method's name."""


def _posterior(model: Any, votes: Votes) -> np.ndarray:
    import pandas as pd

    both = mirrored(votes)
    table = pd.DataFrame({"task": both.pairs, "worker": both.annotators, "label": both.verdicts})
    # In the order of first appearance both names are sorted, which crowd-kit's MACE takes for granted.
    table = table.sort_values("label", kind="stable", ignore_index=True)
    table["worker"] = pd.factorize(table["worker"])[0]
    found = model.fit_predict_proba(table)[1].sort_index().to_numpy()
    pairs = len(votes.per_pair)
    return (found[:pairs] + 1 - found[pairs:]) / 2


# rows ---------------------------------------------------------------------------------------------


def aggregate_votes(rows: Iterable[Row], method: VoteMethod) -> tuple[list[Row], dict[str, float | None]]:
    """One row per pair in place of its votes, and the figures of `describe_agreement` with `ties`, the pairs left out.

    Votes are rows with an `annotator` that have the same prompt and the same two answers, either way round; a second
    vote of an annotator on a pair does not count. The row of a pair has the winner as `chosen`, the number of `votes`,
    the share of them for the winner as `agreement`, the method's probability of it as `confidence` (for the majority,
    the same), and of the other columns those in which the votes for the winner agree. It stands where the first vote
    stood. A pair with one vote, a row without an annotator or without two answers stays as it is.
    """
    given = list(rows)
    groups = _group(given)
    several = [group for group in groups if len(group.rows) > 1]
    votes = _votes(several)
    chances = AGGREGATES[method](votes) if several else np.zeros(0)
    made = {group.place: _winner(group, float(chance)) for group, chance in zip(several, chances, strict=True)}
    grouped = {place for group in several for place in group.places}
    kept = [made.get(place) if place in grouped else row for place, row in enumerate(given)]
    ties = sum(row is None for row in made.values())
    return [row for row in kept if row is not None], describe_agreement(votes) | {"ties": ties}


@dataclass
class _Pair:
    """The votes on one pair, by annotator; verdict 1 means that the answer that sorts first was chosen."""

    place: int
    places: list[int]
    rows: dict[str, Row]
    verdicts: dict[str, int]


def _group(rows: list[Row]) -> list[_Pair]:
    """The votes of every pair, in the order of the pairs' first votes."""
    groups: dict[str, _Pair] = {}
    for place, row in enumerate(rows):
        if any(row.get(name) is None for name in ("annotator", "prompt", "chosen", "rejected")):
            continue
        chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
        key = _text([_text(row["prompt"]), *sorted((chosen, rejected))])
        group = groups.setdefault(key, _Pair(place, [], {}, {}))
        group.places.append(place)
        name = _text(row["annotator"])
        group.rows.setdefault(name, row)
        group.verdicts.setdefault(name, int(chosen < rejected))
    return list(groups.values())


def _votes(groups: list[_Pair]) -> Votes:
    names = sorted({name for group in groups for name in group.rows})
    numbers = {name: number for number, name in enumerate(names)}
    listed = [
        (pair, numbers[name], verdict) for pair, group in enumerate(groups) for name, verdict in group.verdicts.items()
    ]
    pairs, annotators, verdicts = np.array(listed, dtype=int).reshape(-1, 3).T
    return Votes(pairs, annotators, verdicts)


def _winner(group: _Pair, chance: float) -> Row | None:
    """The row of a pair whose answer that sorts first is the better one with that probability; None for a tie."""
    if chance == 0.5:
        return None
    verdict = int(chance > 0.5)
    voters = [row for name, row in group.rows.items() if group.verdicts[name] == verdict]
    like = voters or [_exchanged(row) for row in group.rows.values()]
    shared = {name: value for name, value in like[0].items() if all(row.get(name) == value for row in like)}
    shared.pop("annotator", None)
    agreement = {"votes": len(group.rows), "agreement": len(voters) / len(group.rows)}
    return shared | agreement | {"confidence": max(chance, 1 - chance)}


def _exchanged(row: Row) -> Row:
    """The vote turned round, for a pair that is decided against all who voted on it."""
    turned = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    if isinstance(row.get("truth_flipped"), bool):
        turned["truth_flipped"] = not row["truth_flipped"]
    return {name: value for name, value in turned.items() if name != "margin"}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
