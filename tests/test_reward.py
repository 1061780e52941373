"""The reward model on a tiny random model: objectives, what training may see, the audit, and what is handed over."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf import audit
from rlhf.audit_report import ACTIONS
from rlhf.curves import no_log
from rlhf.data.formats import Row, training_rows, with_ids, write_rows
from rlhf.embeddings import EmbedFiles, embed_answers
from rlhf.errors import UserError
from rlhf.examples import Examples
from rlhf.ledger import Ledger
from rlhf.models import load_scorer, load_tokenizer, save_model
from rlhf.params import AdapterParams, EmbedParams, LedgerParams, RewardParams
from rlhf.pretraining import train_tokenizer
from rlhf.reward import train_reward
from rlhf.reward_losses import OBJECTIVES
from rlhf.reward_rows import RewardFiles
from rlhf.scoring import RewardModel
from tests.tiny import make_transport, run_in_two_processes


def make_rows(count: int, first: int = 0) -> list[Row]:
    """The better answer repeats the number of the prompt; every fifth pair stands the wrong way round."""
    rows: list[Row] = []
    for number in range(first, first + count):
        good, bad = f"<answer> {number}</answer>", "I am not sure" + " at all" * (number % 3)
        chosen, rejected = (bad, good) if number % 5 == 0 else (good, bad)
        row = {"prompt": f"Ben has {number} pens.\n", "chosen": chosen, "rejected": rejected}
        rows.append({**row, "truth_flipped": number % 5 == 0})
    return with_ids(rows)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    tokenizer: Any = train_tokenizer(
        [row["prompt"] + row["chosen"] + row["rejected"] for row in make_rows(40)], 320, 64
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    save_model(LlamaForCausalLM(LlamaConfig(**sizes, **names, pad_token_id=tokenizer.pad_token_id)), tokenizer, folder)
    return folder


def make_section(**changes: Any) -> RewardParams:
    values: dict[str, Any] = {
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "warmup_share": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 100.0,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "precision": "fp32",
        "adapter": None,
        "objective": "selective",
        "ratings": None,
        "frozen": False,
        "hidden": [],
        "group": None,
        "noise_rate": 0.2,
        "margin": None,
        "center_rewards_coefficient": 0.0,
        "transport": make_transport(label_weight=1.0),
        "warmup_epochs": 1.0,
        "ramp_epochs": 0.5,
        "epochs": 2.0,
        "evaluations": 2,
        "judge": False,
    }
    return RewardParams(**{**values, **changes})


def train(
    folder: Path,
    start: Path,
    section: RewardParams,
    rows: list[Row] | None = None,
    test: list[Row] | None = None,
    max_length: int = 64,
) -> Any:
    """The stages embed and reward on preferences, or on ratings where the section asks for them."""
    kind = "ratings" if section.ratings else "preferences"
    write_rows(folder / kind / "train.jsonl", make_rows(20) if rows is None else rows)
    write_rows(folder / kind / "test.jsonl", [] if rows == [] else make_rows(10, first=20) if test is None else test)
    for split in ("train", "test"):
        write_rows(folder / ("preferences" if section.ratings else "ratings") / f"{split}.jsonl", [])
    embed = EmbedParams(model="sft", max_length=max_length, batch_size=8, precision="fp32")
    ledger = Ledger(LedgerParams(on_too_long="drop", max_lost_share=1.0))
    embed_answers(embed, EmbedFiles(start, folder, folder / "embeddings", folder / "lengths"), ledger)
    inputs = (start, start, folder / "embeddings", folder / kind / "train.jsonl", folder / kind / "test.jsonl")
    outputs = (folder / "model", folder / "judge", folder / "report")
    return train_reward(section, RewardFiles(*inputs, *outputs), 0, no_log)


def hash_folder(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_every_parameter_moves_and_the_outputs_are_the_same_twice(tmp_path: Path, start: Path) -> None:
    metrics = train(tmp_path / "a", start, make_section())
    assert metrics == train(tmp_path / "b", start, make_section())
    for name in ("model", "judge", "report"):
        assert hash_folder(tmp_path / "a" / name) == hash_folder(tmp_path / "b" / name)
    before = load_scorer(start).state_dict()
    after = load_scorer(tmp_path / "a" / "model")
    assert after.config.num_labels == 1
    assert all(not torch.equal(value, after.state_dict()[name]) for name, value in before.items())
    assert not list((tmp_path / "a" / "model").glob("*.bin"))
    wanted = {"accuracy", "auroc", "loss", "margin", "accuracy_clean", "noise_rate_estimated", "noise_rate_used"}
    wanted |= {"length_only_accuracy", "length_only_accuracy_clean", "audit_precision", "audit_recall", "rows"}
    assert wanted <= metrics.keys()
    assert all(value is None or math.isfinite(value) for value in metrics.values())
    assert metrics["noise_rate_true"] == pytest.approx(0.2)
    assert metrics["audit_flagged"] == 4
    assert sum(metrics[f"audit_suggested_{action}"] for action in ACTIONS) == pytest.approx(1)
    assert {path.name for path in (tmp_path / "a" / "report").iterdir()} == {
        "audit.html",
        "audit.parquet",
        "curves.csv",
        "margins.png",
        "samples.json",
    }
    assert "mass" in (tmp_path / "a" / "report" / "curves.csv").read_text().splitlines()[0]


def test_truth_columns_never_reach_training(tmp_path: Path, start: Path) -> None:
    """Poisoned truth changes the figures that measure against it, and no byte of the model."""
    rows = make_rows(20)
    poisoned = [{**row, "truth_flipped": not row["truth_flipped"], "truth_margin": 1e9} for row in rows]
    clean_metrics = train(tmp_path / "a", start, make_section(), rows)
    metrics = train(tmp_path / "b", start, make_section(), poisoned)
    assert hash_folder(tmp_path / "a" / "model") == hash_folder(tmp_path / "b" / "model")
    assert metrics["noise_rate_true"] == pytest.approx(1 - clean_metrics["noise_rate_true"])
    assert metrics["accuracy"] == clean_metrics["accuracy"]


def test_without_truth_there_are_no_figures_against_it(tmp_path: Path, start: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "truth_flipped"} for row in make_rows(20)]
    metrics = train(tmp_path, start, make_section(), rows)
    assert "audit_precision" not in metrics
    assert "accuracy_clean" in metrics


@pytest.mark.parametrize("objective", ["bradley_terry", "selective"])
def test_four_small_batches_equal_one_large(tmp_path: Path, start: Path, objective: str) -> None:
    """The plan of a batch sees that batch only, so selection is compared while everything is kept."""
    section = {"objective": objective, "warmup_epochs": 9.0, "epochs": 1.0}
    section["transport"] = make_transport(label_weight=1e-4)
    train(tmp_path / "large", start, make_section(**section, batch_size=8))
    train(tmp_path / "small", start, make_section(**section, batch_size=2, gradient_accumulation_steps=4))
    large, small = (load_scorer(tmp_path / name / "model").state_dict() for name in ("large", "small"))
    for name in large:
        torch.testing.assert_close(large[name], small[name], atol=2e-4, rtol=1e-3)


def fit_in_this_process(folder: Path, start: Path) -> None:
    """Train by two objectives on train.jsonl of the folder, several forward passes a step, and save the ledgers."""
    from rlhf import examples
    from rlhf.pairwise import Job, Verdict, fit_scorer

    examples.GROUP = 3
    tokenizer: Any = load_tokenizer(start)
    rows = training_rows(folder / "train.jsonl")
    ids, prompts = ([row[name] for row in rows] for name in ("id", "prompt"))
    sides = examples.encode_sides(tokenizer, rows, ("chosen", "rejected"))
    pairs = Examples(ids, prompts, np.arange(2 * len(rows)).reshape(-1, 2), sides, None, 0)
    verdict = Verdict(np.arange(len(pairs)) / 10, np.arange(len(pairs)) % 3 > 0)
    for objective in ("selective", "co_teaching"):
        section = make_section(objective=objective, warmup_epochs=0.0, center_rewards_coefficient=0.1)
        model = folder / f"{objective}-model"
        _, ledger = fit_scorer(section, Job(start, tokenizer, pairs, None, 0.4, model, verdict), 0, no_log)
        name = f"{objective}-{os.environ.get('RANK', 0)}.npy"
        np.save(folder / name, np.stack([ledger.margins, ledger.mean_kept()]))


def test_two_processes_give_the_model_of_one(tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is that of the whole batch, and both processes know what became of every pair."""
    for name in ("one", "two"):
        write_rows(tmp_path / name / "train.jsonl", make_rows(24))
    monkeypatch.setattr("rlhf.examples.GROUP", 32)  # and back to what it was
    fit_in_this_process(tmp_path / "one", start)
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.test_reward import fit_in_this_process\n"
        "fit_in_this_process(*map(Path, sys.argv[1:]))\n"
    )
    run_in_two_processes(str(script), str(tmp_path / "two"), str(start))
    for objective in ("selective", "co_teaching"):
        one, two = (load_scorer(tmp_path / name / f"{objective}-model").state_dict() for name in ("one", "two"))
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=1e-3)
        ledger = np.load(tmp_path / "one" / f"{objective}-0.npy")
        for rank in (0, 1):
            np.testing.assert_allclose(np.load(tmp_path / "two" / f"{objective}-{rank}.npy"), ledger, atol=1e-3)


def test_processes_that_cannot_share_a_batch_are_refused(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size is 8, which 3 processes cannot share evenly"):
        train(tmp_path, start, make_section())


def test_the_second_model_of_co_teaching_is_not_saved(tmp_path: Path, start: Path) -> None:
    adapter = AdapterParams(rank=4, alpha=8, dropout=0.0, target_modules="all-linear", quantise=None)
    for name, changes in {"whole": {}, "adapter": {"adapter": adapter}}.items():
        train(tmp_path / name, start, make_section(objective="co_teaching", **changes))
        with safe_open(tmp_path / name / "model" / "model.safetensors", "pt") as file:
            assert not [key for key in file.keys() if "peer" in key]  # noqa: SIM118 - a file is no mapping
            assert file.get_tensor("score.weight").abs().max() > 0


def test_margins_reach_the_loss(tmp_path: Path, start: Path) -> None:
    rows = [{**row, "gap": 5.0} for row in make_rows(20)]
    plain = make_section(objective="bradley_terry")
    train(tmp_path / "plain", start, plain, rows)
    train(tmp_path / "ahead", start, plain.model_copy(update={"margin": "gap"}), rows)
    assert hash_folder(tmp_path / "plain" / "model") != hash_folder(tmp_path / "ahead" / "model")
    rows[4]["gap"] = "large"
    with pytest.raises(UserError, match="gap is 'large', no number; mend it or set reward.margin to null"):
        train(tmp_path / "wrong", start, plain.model_copy(update={"margin": "gap"}), rows)
    with pytest.raises(ValueError, match="selective has no margin; set margin to null"):
        make_section(margin="gap")


def test_centring_keeps_the_rewards_near_zero(tmp_path: Path, start: Path) -> None:
    rows, sums = make_rows(10, first=20), []
    for name, coefficient in {"free": 0.0, "centred": 10.0}.items():
        section = make_section(objective="bradley_terry", epochs=8.0, center_rewards_coefficient=coefficient)
        train(tmp_path / name, start, section)
        scorer = RewardModel(tmp_path / name / "model", batch_size=10)
        prompts = [row["prompt"] for row in rows]
        chosen, rejected = (scorer.score(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
        sums.append(np.square(np.add(chosen, rejected)).mean())
    assert sums[1] < sums[0] / 2


def test_the_noise_rate_of_annotators_that_vote_on_the_same_pairs(tmp_path: Path, start: Path) -> None:
    rows = []
    for number, row in enumerate(make_rows(20)):
        turned = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        rows += [{**row, "annotator": "a"}, {**(turned if number % 5 == 2 else row), "annotator": "b"}]
    metrics = train(tmp_path, start, make_section(noise_rate="agreement"), with_ids(rows))
    assert metrics["noise_rate_used"] == pytest.approx((1 - 0.6**0.5) / 2)
    assert metrics["noise_rate_low"] < metrics["noise_rate_used"] < metrics["noise_rate_high"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_is_merged_into_the_saved_model(tmp_path: Path, start: Path, precision: str) -> None:
    adapter = AdapterParams(rank=4, alpha=8, dropout=0.0, target_modules="all-linear", quantise=None)
    train(tmp_path, start, make_section(adapter=adapter, precision=precision))
    merged: Any = load_scorer(tmp_path / "model")
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    assert merged.score.weight.abs().max() > 0
    before = load_scorer(start).state_dict()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert all("proj" in name or name == "score.weight" for name in changed)
    assert any("proj" in name for name in changed)


def test_the_judge_learns_true_labels_of_held_out_pairs(tmp_path: Path, start: Path) -> None:
    metrics = train(tmp_path, start, make_section(judge=True, epochs=8.0))
    assert metrics["judge_rows"] == 10
    assert metrics["judge_accuracy_clean"] > 0.9
    assert load_scorer(tmp_path / "judge").config.num_labels == 1
    assert hash_folder(tmp_path / "judge") != hash_folder(tmp_path / "model")


def test_without_preferences_a_note_stands_where_the_model_would(tmp_path: Path, start: Path) -> None:
    assert train(tmp_path, start, make_section(), [])["rows"] == 0
    assert "prepare.data.preferences is null" in (tmp_path / "model" / "README").read_text()
    assert (tmp_path / "judge" / "README").exists()


def test_long_pairs_are_counted_and_left_out(tmp_path: Path, start: Path) -> None:
    rows = make_rows(20)
    rows[3]["rejected"] = "no " * 60
    metrics = train(tmp_path, start, make_section(), rows)
    assert (metrics["rows"], metrics["rows_dropped_too_long"]) == (19, 1)
    with pytest.raises(UserError, match=r"20 of them longer than 5 tokens \(embed\.max_length"):
        train(tmp_path, start, make_section(), rows, max_length=5)


def test_an_estimate_that_cannot_be_made_is_refused_only_where_it_is_needed(tmp_path: Path, start: Path) -> None:
    with pytest.raises(UserError, match="too few to estimate the noise rate"):
        train(tmp_path, start, make_section(noise_rate="estimate"), make_rows(4))
    assert train(tmp_path, start, make_section(), make_rows(4))["noise_rate_estimated"] is None


def test_pooled_states_give_the_scores_of_the_model(start: Path) -> None:
    from rlhf.encoding import encode_answer
    from rlhf.examples import read_answers

    tokenizer: Any = load_tokenizer(start)
    torch.manual_seed(1)
    model: Any = load_scorer(start)
    sequences = [encode_answer(tokenizer, row["prompt"], row["rejected"]) for row in make_rows(5)]
    scores, embeddings = read_answers(model, sequences, 2)
    np.testing.assert_allclose(embeddings @ model.score.weight.detach().numpy()[0], scores, rtol=1e-4, atol=1e-5)
    alone, _ = read_answers(model, sequences[3:4], 1)
    np.testing.assert_allclose(alone[0], scores[3], rtol=1e-4, atol=1e-5)
    assert [ids[-1] for ids in sequences] == [tokenizer.eos_token_id] * 5


def test_groups_of_similar_length_change_neither_scores_nor_gradients(
    start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf import examples
    from rlhf.encoding import encode_answer, pad_batch

    tokenizer: Any = load_tokenizer(start)
    texts = ["a", "b " * 20, "c d", "e " * 9, "f"]
    batch = pad_batch([encode_answer(tokenizer, "Ben has 3 pens.\n", text) for text in texts], tokenizer.pad_token_id)
    results = []
    for group in (2, 100):
        monkeypatch.setattr(examples, "GROUP", group)
        torch.manual_seed(2)
        model: Any = load_scorer(start)
        scores, embeddings = examples.read_batch(model, model, batch, tokenizer.pad_token_id)
        (scores * torch.arange(5)).sum().backward()
        results.append((scores.detach(), embeddings.detach(), model.model.embed_tokens.weight.grad))
    for small, large in zip(*results, strict=True):
        torch.testing.assert_close(small, large, atol=1e-5, rtol=1e-4)


def test_measured_margins_by_hand() -> None:
    from rlhf.pairwise import measure_margins

    figures = measure_margins(np.array([1.0, 2.0, -1.0, 0.0]))
    assert figures["accuracy"] == 0.625
    assert figures["margin"] == 0.5
    # Against -1, -2, 1 and 0: 1 beats 2.5 of them, counting its tie half, 2 beats 4, -1 beats 1.5, 0 beats 2.5.
    assert figures["auroc"] == pytest.approx((3.5 + 4 + 1.5 + 2.5) / 16)


def test_audit_by_hand() -> None:
    """Five pairs, two wrong; two flagged, one of them rightly; 4 of 6 (wrong, right) pairs in order."""
    suspects = np.array([4, 0, 2, 1, 3])
    grades = audit.grade_audit(suspects, [False, True, False, False, True], 0.4)
    assert grades == {
        "audit_flagged": 2,
        "audit_precision": 0.5,
        "audit_recall": 0.5,
        "audit_auroc": pytest.approx(4 / 6),
    }
    assert audit.grade_audit(suspects, [False] * 5, 0.0)["audit_precision"] is None


def test_the_lowest_margin_is_the_first_suspect_and_an_unvisited_pair_the_last() -> None:
    margins = np.array([0.5, np.nan, -3.0, 2.0])
    assert audit.rank_suspects(margins, None).tolist() == [2, 0, 3, 1]
    assert audit.rank_suspects(margins, np.array([0.4, 0.3, 0.2, 0.1])).tolist() == [3, 2, 1, 0]


def test_as_many_labels_as_are_wrong_are_not_believed() -> None:
    from rlhf.label_study import Noise
    from rlhf.trust import Trust

    right = np.array([0.9, 0.1, 0.4, 0.6])
    verdict = Noise(None, 0.5, None, Trust(right, {}, right, right)).verdict()
    assert verdict is not None
    assert verdict.believed.tolist() == [True, False, False, True]
    assert verdict.doubt.tolist() == pytest.approx([0, math.log(9), math.log(1.5), 0])


@pytest.mark.parametrize("ratings", [None, {"low": 0, "high": 4, "positive": 2}])
def test_labels_are_judged_by_looks_where_embeddings_say_nothing(
    tmp_path: Path, start: Path, ratings: dict[str, Any] | None
) -> None:
    """Good answers end with an exclamation mark; every fifth label is wrong."""
    from rlhf.label_study import study_labels
    from rlhf.reward_rows import open_source

    section = make_section(ratings=ratings, frozen=True)
    numbers = range(100)
    if ratings:
        rows = [{"completion": f"Yes{'.!'[n % 2]}", "score": 4.0 * (n % 2 == (n % 5 > 0))} for n in numbers]
    else:
        sides = (("chosen", "rejected")[:: 1 if n % 5 else -1] for n in numbers)
        rows = [{good: "Yes!", bad: "Yes."} for good, bad in sides]
    listed = with_ids([{"prompt": f"Ben has {n} pens.\n", **row} for n, row in enumerate(rows)])
    train(tmp_path, start, section, listed, listed)
    kind, names = "ratings" if ratings else "preferences", ("train.jsonl", "test.jsonl")
    inputs = (start, start, tmp_path / "embeddings", *(tmp_path / kind / name for name in names))
    source = open_source(section, RewardFiles(*inputs, *(tmp_path / name for name in ("model", "judge", "report"))))
    blind = replace(source, vectors=np.random.default_rng(0).normal(size=source.vectors.shape))
    found = study_labels(blind, source.read(source.files.train, "train"), 0)
    assert found.trust is not None
    assert set(np.argsort(found.trust.right)[:20]) == set(range(0, 100, 5))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(tmp_path: Path, start: Path, objective: str) -> None:
    metrics = train(tmp_path, start, make_section(objective=objective, epochs=1.0, warmup_epochs=0.0))
    assert load_scorer(tmp_path / "model").score.weight.abs().max() > 0
    assert math.isfinite(metrics["loss"])
    table = pyarrow.parquet.read_table(tmp_path / "report" / "audit.parquet")
    told = {"action", "wrong", "called_wrong", "contradicting", "contradicting_ids"}
    known = {"id", "loss", "margin", "kept", "prompt", "chosen", "rejected"}
    assert set(table.column_names) == (known | told if objective in ("selective", "cleanlab") else known)
    assert table.num_rows == metrics["rows"]
    assert not any(name.startswith("truth_") for name in table.column_names)


def test_the_noise_of_every_group_is_reported(tmp_path: Path, start: Path) -> None:
    rows = [{**row, "source": "web" if number % 3 else "forum"} for number, row in enumerate(make_rows(20))]
    train(tmp_path, start, make_section(group="source"), rows)
    lines = (tmp_path / "report" / "groups.csv").read_text().splitlines()
    assert lines[0] == "group,pairs,wrong"
    assert {line.split(",")[0]: int(line.split(",")[1]) for line in lines[1:]} == {"web": 13, "forum": 7}


def test_a_group_that_is_no_column_is_refused_before_training(tmp_path: Path, start: Path) -> None:
    with pytest.raises(UserError, match=r"no .topic., which reward\.group names; .*name one of them"):
        train(tmp_path, start, make_section(group="topic"))
    assert not (tmp_path / "model").exists()


def test_length_baseline_follows_the_taste_of_the_training_labels() -> None:
    short = [{"chosen": "a", "rejected": "bcd"}]
    assert audit.measure_length_baseline(short, [{"chosen": "abcd", "rejected": "b"}]).tolist() == [-3]
    assert audit.measure_length_baseline([], [{"chosen": "abcd", "rejected": "b"}]).tolist() == [3]


def test_turned_pairs_have_their_answers_exchanged() -> None:
    places = np.array([[0, 1], [2, 3]])
    pairs = Examples(["a", "b"], ["", ""], places, [[[10], [12]], [[11], [13]]], None, 0)
    turned = pairs.turned(np.array([False, True]))
    assert turned.places.tolist() == [[0, 1], [3, 2]]
    assert turned.sides == [[[10], [13]], [[11], [12]]]


def test_samples_are_flat_rows_without_truth(tmp_path: Path, start: Path) -> None:
    train(tmp_path, start, make_section())
    samples = json.loads((tmp_path / "report" / "samples.json").read_text())
    assert set(samples[0]) == {
        *("id", "action", "wrong", "called_wrong", "contradicting"),
        *("loss", "margin", "kept", "prompt", "chosen", "rejected"),
    }
