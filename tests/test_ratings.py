"""Ratings instead of preferences: from the file to the reward model, the figures by hand, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from rlhf.curves import no_log
from rlhf.data.formats import Row, read_rows, with_ids, write_rows
from rlhf.errors import UserError
from rlhf.models import load_scorer
from rlhf.params import Params, RatingParams
from rlhf.ratings import (
    Threshold,
    calibration_error,
    constant_error,
    find_threshold,
    guess_by_length,
    measure_ratings,
    read_scores,
    with_constant,
)
from rlhf.scoring import RewardModel
from rlhf.trust import trust_labels
from tasks import embed, prepare, reward, validate
from tasks.paths import Paths
from tests.test_reward import hash_folder, make_section, train
from tests.tiny import tiny_params

SCALE = RatingParams(low=0, high=4, positive=3)


def make_ratings(count: int, first: int = 0, wrong_every: int = 5) -> list[Row]:
    """An answer is good where it repeats the number of the prompt; every fifth rating is that of the other kind."""
    rows: list[Row] = []
    for number in range(first, first + count):
        is_good = number % 2 == 0
        completion = f"<answer> {number}</answer>" if is_good else "I am not sure"
        true = 4 if is_good else 1
        score = 5 - true if number % wrong_every == 0 else true
        prompt = f"Ben has {number} pens.\n"
        rows.append({"prompt": prompt, "completion": completion, "score": score, "truth_score": true})
    return rows


# the pipeline -------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path, tiny_model_dir: Path) -> tuple[Params, Paths]:
    """A params file whose labels are ratings of a file, and that file."""
    paths = Paths(tmp_path)
    ratings = [*make_ratings(240), {"prompt": "Tom has 3 pens.\n", "completion": "3", "score": 9, "truth_score": 4}]
    write_rows(tmp_path / "ratings.jsonl", ratings)
    write_rows(tmp_path / "sft.jsonl", make_ratings(24, wrong_every=1000))
    described = {"kind": "file", "shape": "canonical", "columns": {}, "test_share": 0.25, "limit": None}
    raw = tiny_params()
    raw["prepare"] |= {"base_model": str(tiny_model_dir), "world": None}
    raw["prepare"]["data"] |= {
        "sft": described | {"path": "sft.jsonl"},
        "preferences": None,
        "ratings": described | {"path": "ratings.jsonl"},
        "prompts": described | {"path": "sft.jsonl"},
    }
    for policy in ("dpo",):
        del raw["policies"][policy]
    raw["reward"] |= {"ratings": {"low": 0, "high": 4, "positive": "mean"}, "frozen": True, "hidden": [8]}
    raw["reward"] |= {"epochs": 40, "batch_size": 32, "noise_rate": 0.2, "learning_rate": 0.02, "judge": True}
    return Params.model_validate(raw), paths


def test_ratings_go_through_the_pipeline_and_a_reward_model_comes_out(workspace: tuple[Params, Paths]) -> None:
    params, paths = workspace
    prepare.run(params, paths, no_log)
    validate.run(params, paths, no_log)
    shutil.copytree(paths.model("base"), paths.model("sft"))
    embed.run(params, paths, no_log)
    reward.run(params, paths, no_log)

    (aside,) = read_rows(paths.quarantine / "ratings.jsonl")
    assert (aside["reason"], aside["score"]) == ("score_off_scale", 9)
    counts = json.loads(paths.metrics("embed").read_text())
    validated = json.loads(paths.metrics("validate").read_text())["ratings"]
    assert counts["ledger"]["ratings/train"]["used"] == validated["kept"]["train"]
    assert 2 < validated["mean_score"] < 3
    metrics = json.loads(paths.metrics("reward").read_text())
    wanted = {"accuracy", "auroc", "mae", "r2", "ece", "constant_mae", "accuracy_clean", "noise_rate_estimated"}
    wanted |= {"length_only_accuracy", "audit_precision", "noise_rate_true", "judge_accuracy_clean"}
    assert wanted <= metrics.keys()
    assert metrics["accuracy_clean"] > 0.9
    assert metrics["auroc_clean"] > 0.95
    assert metrics["judge_accuracy_clean"] > 0.9
    assert metrics["audit_auroc"] > 0.75
    model = RewardModel(paths.model("reward"), 4)
    good, bad = model.score(["Ben has 298 pens.\n"] * 2, ["<answer> 298</answer>", "I am not sure"])
    assert good > 0 > bad
    suspect = json.loads((paths.report("reward") / "samples.json").read_text())[0]
    assert {"prompt", "completion", "score", "wrong"} <= suspect.keys()
    assert "truth_score" not in suspect


@pytest.mark.parametrize("objective", ["selective", "bradley_terry"])
def test_a_whole_model_learns_from_ratings_too(tmp_path: Path, tiny_model_dir: Path, objective: str) -> None:
    section = make_section(ratings=SCALE, objective=objective, epochs=6.0, judge=True)
    rows, test = with_ids(make_ratings(40)), with_ids(make_ratings(20, first=40))
    metrics = train(tmp_path, tiny_model_dir, section, rows, test, max_length=128)
    assert metrics["accuracy_clean"] > 0.8
    assert metrics["judge_rows"] == 20
    assert all(value is None or math.isfinite(value) for value in metrics.values())
    moved = load_scorer(tmp_path / "model").state_dict()
    assert all(not torch.equal(value, moved[name]) for name, value in load_scorer(tiny_model_dir).state_dict().items())


def test_true_ratings_never_reach_training(tmp_path: Path, tiny_model_dir: Path) -> None:
    section = make_section(ratings=SCALE, frozen=True)
    rows, test = with_ids(make_ratings(40)), with_ids(make_ratings(20, first=40))
    poisoned = [{**row, "truth_score": 5 - row["truth_score"]} for row in rows]
    clean_metrics = train(tmp_path / "a", tiny_model_dir, section, rows, test, max_length=128)
    metrics = train(tmp_path / "b", tiny_model_dir, section, poisoned, test, max_length=128)
    assert hash_folder(tmp_path / "a" / "model") == hash_folder(tmp_path / "b" / "model")
    assert metrics["noise_rate_true"] == pytest.approx(1 - clean_metrics["noise_rate_true"])


def test_groups_of_ratings_are_judged(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = with_ids({**row, "annotator": f"a{number % 3}"} for number, row in enumerate(make_ratings(40)))
    section = make_section(ratings=SCALE, frozen=True, group="annotator")
    train(tmp_path, tiny_model_dir, section, rows, with_ids(make_ratings(20, first=40)), max_length=128)
    lines = (tmp_path / "report" / "groups.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines[1:]} == {"a0", "a1", "a2"}


# what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "positive", "message"),
    [
        ([0, 4, 5], "mean", "row 2: score 5 is off the scale 0 to 4; mend it"),
        ([0, -1, 4], "mean", "row 1: score -1 is off the scale 0 to 4"),
        ([3, 3, 3], "median", "all 3 training ratings are bad, as good is > 3; choose another"),
        ([3, 3, 3], "mean", "all 3 training ratings are good, as good is >= 3"),
        ([1, 2, 2], 3.5, "all 3 training ratings are bad, as good is >= 3.5"),
        ([2], "mean", "all 1 training ratings are good"),
    ],
)
def test_ratings_that_are_no_labels_are_refused(scores: list[float], positive: Any, message: str) -> None:
    section = RatingParams(low=0, high=4, positive=positive)
    rows = [{"id": str(number), "score": score} for number, score in enumerate(scores)]
    with pytest.raises(UserError, match=message):
        find_threshold(section, read_scores(section, rows))


def test_too_few_ratings_give_no_estimate(tmp_path: Path, tiny_model_dir: Path) -> None:
    section = make_section(ratings=SCALE, frozen=True, noise_rate="estimate")
    rows, test = with_ids(make_ratings(4)), with_ids(make_ratings(4, first=4))
    with pytest.raises(UserError, match="too few to estimate the noise rate"):
        train(tmp_path, tiny_model_dir, section, rows, test, max_length=128)


# figures by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positive", "expected"), [("median", [-1, -1, 1, 1]), ("mean", [-1, -1, 1, 1]), (2, [-1, 1, 1, 1])]
)
def test_thresholds(positive: Any, expected: list[int]) -> None:
    scores = np.array([0.0, 2.0, 3.0, 4.0])
    found = find_threshold(RatingParams(low=0, high=4, positive=positive), scores)
    assert found.label(scores).tolist() == expected
    assert found.is_good == (positive != "median")


def test_a_rating_on_the_threshold() -> None:
    """The median itself is not good, the mean and a number are."""
    scores = np.array([1.0, 2.0, 2.0, 3.0])
    assert find_threshold(RatingParams(low=0, high=4, positive="median"), scores) == Threshold(2.0, False)
    assert find_threshold(RatingParams(low=0, high=4, positive="mean"), scores) == Threshold(2.0, True)
    assert Threshold(2.0, False).label(scores).tolist() == [-1, -1, -1, 1]
    assert Threshold(2.0, True).label(scores).tolist() == [-1, 1, 1, 1]


def test_figures_of_four_ratings_by_hand() -> None:
    logits = np.array([math.log(3), math.log(3), -math.log(3), 0.0])  # probabilities .75 .75 .25 .5
    figures = measure_ratings(logits, np.array([1, -1, -1, 1]))
    assert figures["accuracy"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert figures["mae"] == pytest.approx((0.25 + 0.75 + 0.25 + 0.5) / 4)
    assert figures["r2"] == pytest.approx(1 - (0.0625 + 0.5625 + 0.0625 + 0.25) / 1)
    assert figures["auroc"] == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    # .75 twice, half of them good; .25 none; .5 all: (2 * .25 + .25 + .5) / 4
    assert figures["ece"] == pytest.approx((0.5 + 0.25 + 0.5) / 4)
    one_kind = measure_ratings(np.array([1.0, 2.0]), np.array([1, 1]))
    assert one_kind["auroc"] is None
    assert one_kind["r2"] is None


def test_probabilities_of_one_and_zero_have_bins() -> None:
    assert calibration_error(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0
    assert calibration_error(np.array([0.0, 1.0]), np.array([1.0, 0.0])) == 1


def test_the_best_constant_says_what_most_training_labels_say() -> None:
    assert constant_error(np.array([1, 1, -1]), np.array([1, -1, -1, -1])) == 0.75
    assert constant_error(np.array([-1, 1, -1]), np.array([1, -1, -1, -1])) == 0.25


def test_a_judge_of_length_learns_which_lengths_are_liked() -> None:
    known = [{"completion": "a"}, {"completion": "abc"}]
    assert guess_by_length(known, np.array([-1, 1]), [{"completion": "abcd"}]).tolist() == [2]
    assert guess_by_length(known, np.array([1, -1]), [{"completion": "abcd"}]).tolist() == [-2]


def test_wrong_ratings_are_found_also_where_few_are_good() -> None:
    """The constant knows that most are bad."""
    generator = np.random.default_rng(0)
    points = generator.normal(size=(400, 8)) + 3
    wrong = generator.random(400) < 0.2
    labels = np.where((points[:, 0] > np.quantile(points[:, 0], 0.85)) != wrong, 1, -1)
    found = trust_labels(with_constant(points) * labels[:, None], np.arange(800).reshape(-1, 2), 0.2, 0)
    assert roc_auc_score(wrong, 1 - found.right) > 0.9
