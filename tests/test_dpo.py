"""DPO: which pairs it learns from, what the loss of the chosen answers adds, and what is refused."""

from pathlib import Path

import pytest

from rlhf.curves import CurveRecorder, no_log
from rlhf.data.formats import training_rows, write_rows
from rlhf.errors import UserError
from rlhf.params_file import load_params
from rlhf.policies import pairs, train_policy
from tests.learning import change

ROOT = Path(__file__).parent.parent


@pytest.fixture
def params():
    section = load_params(ROOT / "params.yaml").policies["dpo"]
    return section.model_copy(
        update={
            "contradicted": "keep",
            "sft_weight": 0.0,
            "epochs": 2,
            "batch_size": 8,
            "max_length": 256,
            "learning_rate": 0.01,
        }
    )


@pytest.fixture
def scores(monkeypatch):
    """Give every answer a score of the test's choice instead of a reward model's."""

    def use(score):
        class Known:
            def __init__(self, *_):
                pass

            def score(self, prompts, completions):
                return [score(answer) for answer in completions]

        monkeypatch.setattr(pairs, "RewardModel", Known)

    return use


PAIRS = [{"id": str(n), "prompt": "p", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]


def settle(params, policy_files, contradicted):
    curves = CurveRecorder(no_log)
    rows = pairs.settle_contradictions(
        PAIRS, params.model_copy(update={"contradicted": contradicted}), policy_files, curves
    )
    return rows, curves.rows


def test_contradicted_pairs_are_kept_dropped_or_turned_round(params, policy_files, scores):
    scores(lambda answer: 1.0 if answer in ("bad 1", "bad 3") else 0.5 if answer == "bad 2" else 0.75)
    assert settle(params, policy_files, "keep") == (PAIRS, {})
    dropped, figures = settle(params, policy_files, "drop")
    assert dropped == [PAIRS[0], PAIRS[2]]
    assert figures == {0: {"pairs/contradicted": 0.5}}
    turned, _ = settle(params, policy_files, "relabel")
    assert [row["chosen"] for row in turned] == ["good 0", "bad 1", "good 2", "bad 3"]
    assert [row["rejected"] for row in turned] == ["bad 0", "good 1", "bad 2", "good 3"]


def test_a_tie_is_no_contradiction(params, policy_files, scores):
    scores(lambda answer: 0.0)
    assert settle(params, policy_files, "drop")[0] == PAIRS


def test_nothing_left_to_learn_from_is_an_error(params, policy_files, scores):
    scores(lambda answer: float(answer.startswith("bad")))
    with pytest.raises(UserError, match="contradicts every preference; set policies' contradicted to keep"):
        settle(params, policy_files, "drop")


def test_the_margin_grows(params, policy_files):
    assert change(params, policy_files, "chosen") > change(params, policy_files, "rejected") + 0.5


def test_turned_labels_turn_the_margin(params, policy_files, scores):
    """A judge that contradicts every label: the policy learns the opposite."""
    rejected = {row["rejected"] for row in training_rows(policy_files.preferences)}
    scores(lambda answer: float(answer in rejected))
    turned = params.model_copy(update={"contradicted": "relabel"})
    assert change(turned, policy_files, "chosen") < change(turned, policy_files, "rejected") - 0.5


def test_the_loss_of_the_chosen_answers_raises_them(params, policy_files):
    with_it = params.model_copy(update={"sft_weight": 5.0})
    assert change(with_it, policy_files, "chosen") > change(params, policy_files, "chosen") + 1


def test_a_pair_too_long_is_refused_and_named(params, policy_files):
    with pytest.raises(
        UserError, match=r"row .+ of preferences is \d+ tokens long, max_length is 12; .* ledger.on_too_long to drop"
    ):
        train_policy(params.model_copy(update={"max_length": 12}), policy_files, 0, no_log)


def test_no_pairs_are_refused(params, policy_files, tmp_path):
    from dataclasses import replace

    write_rows(tmp_path / "none.jsonl", [])
    with pytest.raises(UserError, match=r"no preference pairs.*prepare\.data\.preferences"):
        train_policy(params, replace(policy_files, preferences=tmp_path / "none.jsonl"), 0, no_log)
