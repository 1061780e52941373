"""The stage's method from end to end: estimate the noise, train the reward model, audit its data, hand it over."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import audit
from rlhf.audit_report import LabelAudit, sample_suspects, write_audit
from rlhf.curves import CurveRecorder, Log, no_log, rounded_number, write_json
from rlhf.data.formats import Row, completion_text, training_rows
from rlhf.errors import UserError
from rlhf.models import load_tokenizer
from rlhf.neighbours import Contradictions, find_contradictions
from rlhf.noise import NoiseEstimate, estimate_noise_rate, orient_pairs
from rlhf.pairs import Pairs, embed_differences, encode_pairs, sample_rows, score_margins
from rlhf.pairwise import Job, Ledger, Verdict, fit_scorer, load_fresh_scorer, measure_margins
from rlhf.params import RewardParams
from rlhf.scoring import check_reward_model
from rlhf.trust import Trust, trust_labels

logger = logging.getLogger(__name__)

JUDGED = ("selective", "cleanlab")
"""Objectives that are told beforehand what the other pairs say of each label."""
ESTIMATION_PAIRS = 1000
"""At most so many pairs are used for the noise estimate (standard error below 0.02)."""

SUSPECTS_SHOWN = 20
SIDES = ("prompt", "chosen", "rejected")


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
    noise = _study_labels(section, files, tokenizer, train, seed)
    recorder = CurveRecorder(log)
    job = Job(files.start, tokenizer, train, test, noise.rate, files.model, noise.verdict())
    model, ledger = fit_scorer(section, job, seed, recorder)
    recorder.write(files.report / "curves.csv")
    margins = score_margins(model, test, section.batch_size)
    right = noise.trust.right if noise.trust else None
    suspects = audit.rank_suspects(ledger.margins, right)
    metrics: Metrics = {
        **measure_margins(margins),
        **_describe_noise(noise.estimate, noise.rate),
        "rows": len(train),
        "rows_dropped_too_long": train.dropped,
        "held_out_rows": len(test),
        "held_out_rows_dropped_too_long": test.dropped,
        **_measure_length(files, test),
        **_measure_truth(files, test, margins),
        **_audit_training(files, train, suspects, noise.rate),
        **_write_audit(files, train, noise, ledger),
    }
    if noise.trust and noise.groups:
        _write_groups(files.report / "groups.csv", noise.trust, noise.groups)
    if section.judge:
        metrics |= _train_judge(section, files, seed, train)
    else:
        _leave_note(files.judge, "No judge was trained: reward.judge is false.")
    check_reward_model(files.model, training_rows(files.test)[:8])
    return metrics


@dataclass(frozen=True)
class Noise:
    """What is known of the training labels before training; `trust` only where the objective asks for it."""

    estimate: NoiseEstimate | None
    rate: float
    groups: list[str] | None
    trust: Trust | None
    contradictions: Contradictions | None = None

    def verdict(self) -> Verdict | None:
        """What the training is told: doubts, and that all but the worst `rate` of the labels are believed."""
        if self.trust is None:
            return None
        believed = np.ones(len(self.trust.right), dtype=bool)
        believed[np.argsort(self.trust.right, kind="stable")[: round(self.rate * len(believed))]] = False
        return Verdict(self.trust.doubt, believed)


def _study_labels(section: RewardParams, files: RewardFiles, tokenizer: Any, train: Pairs, seed: int) -> Noise:
    """Estimate the noise and, for objectives that ask for it, judge each label, by the untrained model."""
    groups = _read_groups(section, files.train, train)
    is_judged = section.objective in JUDGED
    pairs = train if is_judged else train.sample(ESTIMATION_PAIRS, seed)
    model = load_fresh_scorer(Job(files.start, tokenizer, pairs, None, 0.0, files.start), section)
    differences = embed_differences(model, pairs, section.batch_size)
    estimate = _estimate_noise(section, differences, pairs, seed)
    rate = estimate.rate if section.noise_rate == "estimate" and estimate else float(section.noise_rate)
    if not is_judged:
        return Noise(estimate, rate, groups, None)
    trust = trust_labels(differences, pairs.number_answers()[0], rate, seed, groups)
    return Noise(estimate, rate, groups, trust, find_contradictions(differences, seed))


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


def _read_groups(section: RewardParams, path: Path, train: Pairs) -> list[str] | None:
    """The group of each training pair; None where reward.group is null."""
    if section.group is None:
        return None
    rows = {row["id"]: row for row in training_rows(path)}
    for name in train.ids:
        if rows[name].get(section.group) is None:
            raise UserError(
                f"{path}, row {name}: no {section.group!r}, which reward.group names; "
                f"its columns are {', '.join(rows[name])}; name one of them or set reward.group to null"
            )
    return [str(rows[name][section.group]) for name in train.ids]


def _estimate_noise(section: RewardParams, differences: np.ndarray, pairs: Pairs, seed: int) -> NoiseEstimate | None:
    """The estimate; None where it fails but is not needed."""
    rows = sample_rows(len(pairs), ESTIMATION_PAIRS, seed)
    prompts = [pairs.prompts[row] for row in rows]
    try:
        return estimate_noise_rate(*orient_pairs(differences[rows], seed), prompts, seed)
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


def _audit_training(files: RewardFiles, train: Pairs, suspects: np.ndarray, noise_rate: float) -> Metrics:
    """How well the suspicions against training pairs agree with the truth, read only now."""
    flips = audit.read_flips(files.train)
    if flips is None:
        return {}
    grades = audit.grade_audit(suspects, [flips[name] for name in train.ids], noise_rate)
    return {**grades, "noise_rate_true": float(np.mean([flips[name] for name in train.ids]))}


def _write_groups(path: Path, trust: Trust, groups: list[str]) -> None:
    """The share of wrong labels of every group, the worst first."""
    counts = Counter(groups)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["group", "pairs", "wrong"])
        for name, rate in sorted(trust.rates.items(), key=lambda item: (-item[1], item[0])):
            writer.writerow([name, counts[name], rounded_number(rate)])


def _write_audit(files: RewardFiles, train: Pairs, noise: Noise, ledger: Ledger) -> Metrics:
    """The audit of all training pairs, the most suspicious as a table for MLflow; the share of each suggestion."""
    rows = {row["id"]: row for row in training_rows(files.train)}
    found = LabelAudit(
        ids=train.ids,
        texts={side: [completion_text(rows[name][side]) for name in train.ids] for side in SIDES},
        figures={"loss": np.logaddexp(0, -ledger.margins), "margin": ledger.margins, "kept": ledger.mean_kept()},
        groups=noise.groups,
        trust=noise.trust,
        contradictions=noise.contradictions,
        rate=noise.rate,
        estimate=noise.estimate,
        left_out=train.dropped,
    )
    write_audit(files.report, found)
    write_json(files.report / "samples.json", sample_suspects(found, SUSPECTS_SHOWN))
    return {**found.suggested()}


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
