"""The stage's method from end to end: estimate the noise, train the reward model, audit its data, hand it over."""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import audit
from rlhf.curves import CurveRecorder, Log, no_log, rounded_number, write_json
from rlhf.data.formats import Row, completion_text, render_prompt, training_rows
from rlhf.errors import UserError
from rlhf.models import load_tokenizer
from rlhf.noise import NoiseEstimate, estimate_noise_rate, orient_pairs
from rlhf.pairs import Pairs, embed_differences, encode_pairs, score_margins
from rlhf.pairwise import Job, Ledger, fit_scorer, load_fresh_scorer, measure_margins
from rlhf.params import RewardParams
from rlhf.scoring import check_reward_model

logger = logging.getLogger(__name__)

ESTIMATION_PAIRS = 1000
"""At most so many pairs are embedded for the noise estimate (standard error below 0.02)."""

SUSPECTS_SHOWN = 20


@dataclass(frozen=True)
class RewardFiles:
    """What the stage reads (model to start from, pairs) and writes (reward model, judge, report folder)."""

    start: Path
    train: Path
    test: Path
    model: Path
    judge: Path
    report: Path


Metrics = dict[str, float | int | None]


def train_reward(section: RewardParams, files: RewardFiles, seed: int, log: Log) -> Metrics:
    """Train and save the reward model, and the judge if asked for, and return the metrics.

    Training never sees truth columns; rlhf.audit reads them afterwards for `*_clean` and `audit_*`, which are missing
    where no truth is known. Raises UserError on unusable pairs or if the saved model breaks the hand-off contract.
    """
    if not training_rows(files.train) and not training_rows(files.test):
        return _skip(files)
    tokenizer = load_tokenizer(files.start)
    train = _read_pairs(files.train, tokenizer, section.max_length)
    test = _read_pairs(files.test, tokenizer, section.max_length)
    estimate = _estimate_noise(section, files.start, train, seed)
    noise_rate = estimate.rate if section.noise_rate == "estimate" and estimate else float(section.noise_rate)
    recorder = CurveRecorder(log)
    job = Job(files.start, tokenizer, train, test, noise_rate, files.model)
    model, ledger = fit_scorer(section, job, seed, recorder)
    recorder.write(files.report / "curves.csv")
    margins = score_margins(model, test, section.batch_size)
    metrics: Metrics = {
        **measure_margins(margins),
        **_describe_noise(estimate, noise_rate),
        "rows": len(train),
        "rows_dropped_too_long": train.dropped,
        "held_out_rows": len(test),
        "held_out_rows_dropped_too_long": test.dropped,
        **_measure_length(files, test),
        **_measure_truth(files, test, margins),
        **_audit_training(files, train, ledger, noise_rate),
    }
    _write_suspects(files, tokenizer, train, ledger)
    if section.judge:
        metrics |= _train_judge(section, files, seed, train)
    else:
        _leave_note(files.judge, "No judge was trained: reward.judge is false.")
    check_reward_model(files.model, training_rows(files.test)[:8])
    return metrics


def _skip(files: RewardFiles) -> Metrics:
    """No preferences, no reward model: policies on rule rewards need none, but the stage's outputs must exist."""
    for folder in (files.model, files.judge):
        _leave_note(folder, "No reward model was trained: prepare.data.preferences is null.")
    CurveRecorder(no_log).write(files.report / "curves.csv")
    return {"rows": 0, "held_out_rows": 0}


def _leave_note(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README").write_text(text + "\n", encoding="utf-8")


def _read_pairs(path: Path, tokenizer: Any, max_length: int) -> Pairs:
    return _encode_counted(training_rows(path), path, tokenizer, max_length)


def _encode_counted(rows: list[Row], path: Path, tokenizer: Any, max_length: int) -> Pairs:
    pairs = encode_pairs(tokenizer, rows, max_length)
    if not len(pairs):
        raise UserError(
            f"{path} has no pair for the reward model: {len(rows)} rows, {pairs.dropped} of them longer than "
            f"reward.max_length = {max_length} tokens; raise it, or give more data (or a larger test_share)"
        )
    if pairs.dropped:
        logger.warning("%s: %d pairs longer than %d tokens are left out", path.name, pairs.dropped, max_length)
    return pairs


def _estimate_noise(section: RewardParams, start: Path, train: Pairs, seed: int) -> NoiseEstimate | None:
    """The estimate on embeddings of the untrained model; None where it fails but is not needed."""
    job = Job(start, load_tokenizer(start), train, None, 0.0, start)
    sample = train.sample(ESTIMATION_PAIRS, seed)
    differences = embed_differences(load_fresh_scorer(job, section), sample, section.batch_size)
    try:
        return estimate_noise_rate(*orient_pairs(differences, seed), sample.prompts, seed)
    except UserError as error:
        if section.noise_rate == "estimate":
            raise
        logger.warning("no estimate of the noise rate: %s", error)
        return None


def _describe_noise(estimate: NoiseEstimate | None, used: float) -> Metrics:
    return {
        "noise_rate_estimated": estimate.rate if estimate else None,
        "noise_rate_low": estimate.low if estimate else None,
        "noise_rate_high": estimate.high if estimate else None,
        "noise_rate_used": used,
    }


def _measure_length(files: RewardFiles, test: Pairs) -> Metrics:
    """What counting characters alone would get right on the held-out pairs."""
    rows = {row["id"]: row for row in training_rows(files.test)}
    margins = audit.measure_length_baseline(training_rows(files.train), [rows[name] for name in test.ids])
    flips = audit.read_flips(files.test)
    metrics: Metrics = {"length_only_accuracy": measure_margins(margins)["accuracy"]}
    if flips is not None:
        clean = audit.turn_wrong_margins(margins, test.ids, flips)
        metrics["length_only_accuracy_clean"] = measure_margins(clean)["accuracy"]
    return metrics


def _measure_truth(files: RewardFiles, test: Pairs, margins: np.ndarray) -> Metrics:
    """Figures against the true labels of the held-out pairs, and the histogram of margins."""
    flips = audit.read_flips(files.test)
    audit.draw_margins(margins, [flips[name] for name in test.ids] if flips else None, files.report / "margins.png")
    if flips is None:
        return {}
    clean = measure_margins(audit.turn_wrong_margins(margins, test.ids, flips))
    return {f"{name}_clean": value for name, value in clean.items()}


def _audit_training(files: RewardFiles, train: Pairs, ledger: Ledger, noise_rate: float) -> Metrics:
    """How well the suspicions against training pairs agree with the truth, read only now."""
    flips = audit.read_flips(files.train)
    if flips is None:
        return {}
    suspects = audit.rank_suspects(ledger.margins)
    grades = audit.grade_audit(suspects, [flips[name] for name in train.ids], noise_rate)
    return {**grades, "noise_rate_true": float(np.mean([flips[name] for name in train.ids]))}


def _write_suspects(files: RewardFiles, tokenizer: Any, train: Pairs, ledger: Ledger) -> None:
    """All training pairs by suspicion in audit.csv, the most suspicious in full in samples.json."""
    kept = ledger.mean_kept()
    suspects = audit.rank_suspects(ledger.margins)
    with (files.report / "audit.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "kept", "margin"])
        for pair in suspects:
            figures = (float(kept[pair]), float(ledger.margins[pair]))
            writer.writerow([train.ids[pair], *(rounded_number(figure) for figure in figures)])
    rows = {row["id"]: row for row in training_rows(files.train)}
    shown = []
    for pair in suspects[:SUSPECTS_SHOWN]:
        row = rows[train.ids[pair]]
        texts = {side: completion_text(row[side]) for side in ("chosen", "rejected")}
        figures = {"kept": float(kept[pair]), "margin": float(ledger.margins[pair])}
        shown.append({"id": row["id"], "prompt": render_prompt(tokenizer, row["prompt"]), **texts, **figures})
    write_json(files.report / "samples.json", shown)


def _train_judge(section: RewardParams, files: RewardFiles, seed: int, train: Pairs) -> Metrics:
    """A second model on the held-out pairs with true labels: a yardstick that no policy is trained against."""
    tokenizer = load_tokenizer(files.start)
    pairs = _encode_counted(audit.read_true_rows(files.test), files.test, tokenizer, section.max_length)
    honest = section.model_copy(update={"objective": "bradley_terry"})
    judge, _ = fit_scorer(honest, Job(files.start, tokenizer, pairs, None, 0.0, files.judge), seed + 1, no_log)
    check_reward_model(files.judge, training_rows(files.test)[:8])
    flips = audit.read_flips(files.train)
    unseen = train.sample(ESTIMATION_PAIRS, seed)
    margins = score_margins(judge, unseen, section.batch_size)
    metrics: Metrics = {"judge_rows": len(pairs), "judge_accuracy": measure_margins(margins)["accuracy"]}
    if flips is not None:
        clean = audit.turn_wrong_margins(margins, unseen.ids, flips)
        metrics["judge_accuracy_clean"] = measure_margins(clean)["accuracy"]
    return metrics
