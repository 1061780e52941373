"""The stage's method from end to end: estimate the noise, train the reward model, audit its data, hand it over."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf import audit
from rlhf.audit_report import LabelAudit, sample_suspects, write_audit
from rlhf.curves import CurveRecorder, Log, no_log, rounded_number, write_json
from rlhf.data.formats import completion_text, training_rows
from rlhf.embeddings import ANSWERS
from rlhf.examples import Examples, score_margins
from rlhf.heads import fit_head, score_embedded
from rlhf.label_study import ESTIMATION_ROWS, Noise, study_labels
from rlhf.pairwise import Job, Ledger, Verdict, fit_scorer, measure
from rlhf.params import RewardParams
from rlhf.ratings import constant_error, guess_by_length
from rlhf.reward_rows import RewardFiles, Source, kind_of, open_source, read_leads
from rlhf.scoring import check_reward_model
from rlhf.trust import Trust

SUSPECTS_SHOWN = 20

Metrics = dict[str, float | int | None]
Margins = Callable[[Examples], np.ndarray]
"""By how much a trained model speaks for each label, (rows,)."""


def train_reward(section: RewardParams, files: RewardFiles, seed: int, log: Log) -> Metrics:
    """Train and save the reward model, and the judge if asked for, and return the metrics.

    Training never sees truth columns; rlhf.audit reads them afterwards for `*_clean` and `audit_*`, which are missing
    where no truth is known. Raises UserError on unusable rows or if the saved model breaks the hand-off contract.
    """
    if not training_rows(files.train) and not training_rows(files.test):
        return _skip(section, files)
    source = open_source(section, files)
    train, test = source.read(files.train, "train"), source.read(files.test, "test")
    noise = study_labels(source, train, seed)
    recorder = CurveRecorder(log)
    leads = read_leads(section, files.train, train)
    verdict = replace(noise.verdict() or Verdict.blank(len(train)), leads=leads)
    job = Job(source.start, source.tokenizer, train, test, noise.rate, files.model, verdict)
    measure_by, ledger = _fit(source, job, seed, recorder)
    recorder.write(files.report / "curves.csv")
    margins = measure_by(test)
    right = noise.trust.right if noise.trust else None
    suspects = audit.rank_suspects(ledger.margins, right)
    metrics: Metrics = {
        **measure(margins, test.labels),
        **noise.figures(),
        "rows": len(train),
        "rows_dropped_too_long": train.dropped,
        "held_out_rows": len(test),
        "held_out_rows_dropped_too_long": test.dropped,
        **_measure_constant(train, test),
        **_measure_length(source, train, test),
        **_measure_truth(source, train, test, margins),
        **_audit_training(source, train, suspects, noise.rate),
        **_write_audit(source, train, noise, ledger),
    }
    if noise.trust and noise.groups:
        _write_groups(files.report / "groups.csv", noise.trust, noise.groups)
    if section.judge:
        metrics |= _train_judge(source, seed, train, test)
    else:
        _leave_note(files.judge, "No judge was trained: reward.judge is false.")
    check_reward_model(files.model, training_rows(files.test)[:8], ANSWERS[source.kind])
    return metrics


def _fit(source: Source, job: Job, seed: int, log: Log) -> tuple[Margins, Ledger]:
    """Train a whole model, or a head on the embeddings."""
    section = source.section
    if section.frozen:
        head, ledger = fit_head(section, job, source.vectors, seed, log)
        return lambda examples: score_embedded(head, examples, source.vectors), ledger
    model, ledger = fit_scorer(section, job, seed, log)
    return lambda examples: score_margins(model, examples, section.batch_size), ledger


def _skip(section: RewardParams, files: RewardFiles) -> Metrics:
    """No labels, no reward model: policies on rule rewards need none, but the stage's outputs must exist."""
    for folder in (files.model, files.judge):
        _leave_note(folder, f"No reward model was trained: prepare.data.{kind_of(section)} is null.")
    CurveRecorder(no_log).write(files.report / "curves.csv")
    return {"rows": 0, "held_out_rows": 0}


def _leave_note(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README").write_text(text + "\n", encoding="utf-8")


def _measure_constant(train: Examples, test: Examples) -> Metrics:
    """What ratings are measured against; pairs have no majority."""
    if train.labels is None or test.labels is None:
        return {}
    return {"constant_mae": constant_error(train.labels, test.labels)}


def _measure_length(source: Source, train: Examples, test: Examples) -> Metrics:
    """What counting characters alone would get right on the held-out rows."""
    rows = {row["id"]: row for path in (source.files.train, source.files.test) for row in training_rows(path)}
    known, unknown = ([rows[name] for name in examples.ids] for examples in (train, test))
    if train.labels is None or test.labels is None:
        margins = audit.measure_length_baseline(known, unknown)
    else:
        margins = test.labels * guess_by_length(known, train.labels, unknown)
    metrics: Metrics = {"length_only_accuracy": measure(margins, test.labels)["accuracy"]}
    flips = source.read_flips(source.files.test)
    if flips is not None:
        metrics["length_only_accuracy_clean"] = _measure_clean(margins, test, flips)["accuracy"]
    return metrics


def _measure_clean(margins: np.ndarray, examples: Examples, flips: dict[str, bool]) -> Mapping[str, float | None]:
    """The figures by the true labels."""
    true = examples.turned(np.array([flips[name] for name in examples.ids]))
    return measure(audit.turn_wrong_margins(margins, examples.ids, flips), true.labels)


def _measure_truth(source: Source, train: Examples, test: Examples, margins: np.ndarray) -> Metrics:
    """Figures against the true labels of the held-out rows, and the histogram of margins."""
    flips = source.read_flips(source.files.test)
    wrong = [flips[name] for name in test.ids] if flips else None
    audit.draw_margins(margins, wrong, source.files.report / "margins.png")
    if flips is None:
        return {}
    figures = {**_measure_clean(margins, test, flips), **_measure_constant(train, test.turned(np.array(wrong)))}
    return {f"{name}_clean": value for name, value in figures.items()}


def _audit_training(source: Source, train: Examples, suspects: np.ndarray, noise_rate: float) -> Metrics:
    """How well the suspicions against training rows agree with the truth, read only now."""
    flips = source.read_flips(source.files.train)
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


def _write_audit(source: Source, train: Examples, noise: Noise, ledger: Ledger) -> Metrics:
    """The audit of all training rows, the most suspicious as a table for MLflow; the share of each suggestion."""
    rows = {row["id"]: row for row in training_rows(source.files.train)}
    texts = {
        column: [completion_text(rows[name][column]) for name in train.ids]
        for column in ("prompt", *ANSWERS[source.kind])
    }
    figures = {"loss": np.logaddexp(0, -ledger.margins), "margin": ledger.margins, "kept": ledger.mean_kept()}
    if train.labels is not None:
        figures["score"] = np.array([rows[name]["score"] for name in train.ids])
    found = LabelAudit(
        ids=train.ids,
        texts=texts,
        figures=figures,
        groups=noise.groups,
        trust=noise.trust,
        contradictions=noise.contradictions,
        rate=noise.rate,
        estimate=noise.estimate,
        left_out=train.dropped,
    )
    report = source.files.report
    write_audit(report, found)
    write_json(report / "samples.json", sample_suspects(found, SUSPECTS_SHOWN))
    return {**found.suggested()}


def _train_judge(source: Source, seed: int, train: Examples, test: Examples) -> Metrics:
    """A second model on the held-out rows with true labels: a yardstick that no policy is trained against."""
    files, honest = source.files, source.section.model_copy(update={"objective": "bradley_terry", "margin": None})
    flips = source.read_flips(files.test) or {}
    true = test.turned(np.array([flips.get(name, False) for name in test.ids]))
    job = Job(source.start, source.tokenizer, true, None, 0.0, files.judge)
    measure_by, _ = _fit(replace(source, section=honest), job, seed + 1, no_log)
    check_reward_model(files.judge, training_rows(files.test)[:8], ANSWERS[source.kind])
    unseen = train.sample(ESTIMATION_ROWS, seed)
    margins = measure_by(unseen)
    metrics: Metrics = {"judge_rows": len(true), "judge_accuracy": measure(margins, unseen.labels)["accuracy"]}
    flips = source.read_flips(files.train)
    if flips is not None:
        metrics["judge_accuracy_clean"] = _measure_clean(margins, unseen, flips)["accuracy"]
    return metrics
