"""Training on pairs and ratings: objectives, TRL's reward trainer with its loss replaced, a ledger of the labels."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from rlhf.curves import Log
from rlhf.encoding import pad_batch
from rlhf.examples import Examples, read_batch, score_margins
from rlhf.models import (
    load_fresh_scorer,
    lora_config,
    save_model,
    set_determinism,
    target_modules_named,
    trainer_settings,
)
from rlhf.params import RewardParams
from rlhf.ratings import measure_ratings
from rlhf.reward_losses import OBJECTIVES, TWINS, RewardBatch
from rlhf.selective import mass_schedule, orient_batch
from rlhf.training import evaluation_steps, fold_adapter, report_curves


@dataclass
class Ledger:
    """What happened to each training row: its last margin, and the mean share of its label used while dropping."""

    margins: np.ndarray
    kept: np.ndarray
    visits: np.ndarray
    figures: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def blank(cls, count: int) -> Ledger:
        return cls(np.full(count, np.nan), np.zeros(count), np.zeros(count))

    def enter(self, rows: np.ndarray, margins: np.ndarray, kept: np.ndarray, mass: float) -> None:
        """Note one batch; shares count only once mass is below 1, before that everything is kept."""
        self.margins[rows] = margins
        if mass < 1:
            self.kept[rows] += kept
            self.visits[rows] += 1
        batch = {"mass": mass, "accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}
        for name, value in batch.items():
            self.figures.setdefault(name, []).append(value)

    def mean_kept(self) -> np.ndarray:
        """(rows,) between 0 and 1; 1 for rows not visited while labels were dropped."""
        return np.where(self.visits > 0, self.kept / np.maximum(self.visits, 1), 1.0)

    def take_figures(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: float(np.mean(values)) for name, values in self.figures.items()}
        self.figures.clear()
        return means


@dataclass(frozen=True)
class Verdict:
    """What is known of the training labels beforehand.

    `doubt` (rows,) in nats, `believed` (rows,) yes or no, and `leads` (rows,), which margins should be above.
    """

    doubt: np.ndarray
    believed: np.ndarray
    leads: np.ndarray | None = None

    @classmethod
    def blank(cls, count: int) -> Verdict:
        return cls(np.zeros(count), np.ones(count, dtype=bool))


class PairwiseTrainer(RewardTrainer):
    """TRL's reward trainer with another loss; the attributes below are set before training.

    The loss is that of the whole batch: with several processes the objective sees the pairs of all of them.
    """

    section: RewardParams
    noise_rate: float
    padding: int
    labels: np.ndarray | None
    generator: torch.Generator
    ledger: Ledger
    verdict: Verdict

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        section = self.section
        rows = self._whole(inputs.pop("rows")).cpu().numpy()
        head: Any = self.accelerator.unwrap_model(model)
        scores, embeddings = read_batch(model, head, inputs, self.padding)
        sides = len(scores) * self.accelerator.num_processes // len(rows)
        labels = None if self.labels is None else torch.from_numpy(self.labels[rows]).to(scores)
        reading = Reading(self._whole(scores, sides), self._whole(embeddings.detach(), sides), labels)
        if section.objective in TWINS:
            peer_scores, _ = read_batch(head.peer, head.peer, inputs, self.padding)
            reading = replace(reading, peer_scores=self._whole(peer_scores, sides))
        mass = mass_schedule(self.state.epoch or 0.0, section.warmup_epochs, section.ramp_epochs, self.noise_rate)
        known = Known(self.verdict, rows, mass, self.noise_rate)
        loss, margins, kept = reward_loss(section, reading, known, self.generator)
        self.ledger.enter(rows, margins.cpu().numpy(), kept.cpu().numpy(), mass)
        # Every process has the loss of the whole batch, but the gradient of its part alone, and these are averaged.
        loss = loss + (self.accelerator.num_processes - 1) * (loss - loss.detach())
        return (loss, {"logits": scores}) if return_outputs else loss

    def _whole(self, part: torch.Tensor, sides: int = 1) -> torch.Tensor:
        """The batch of all processes in their order, side after side; this process's part alone carries a gradient."""
        if self.accelerator.num_processes == 1:
            return part
        whole = []
        for own in part.chunk(sides):
            gathered: Any = self.accelerator.gather(own.detach())
            parts = list(gathered.chunk(self.accelerator.num_processes))
            parts[self.accelerator.process_index] = own
            whole += parts
        return torch.cat(whole)


@dataclass(frozen=True)
class Reading:
    """What a model makes of a batch of B rows, side after side: of pairs the chosen answers before the rejected ones.

    `scores` (sides * B,), `embeddings` (sides * B, D) without gradient, `labels` (B,) of ratings, None for pairs;
    `peer_scores` like `scores`, by the second model where the objective has one.
    """

    scores: torch.Tensor
    embeddings: torch.Tensor
    labels: torch.Tensor | None
    peer_scores: torch.Tensor | None = None


@dataclass(frozen=True)
class Known:
    """What is known of the labels of a batch: the verdict on all of them, which `rows` (B,) these are, and shares."""

    verdict: Verdict
    rows: np.ndarray
    mass: float
    noise_rate: float


def reward_loss(
    section: RewardParams, reading: Reading, known: Known, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of a batch, its margins (B,) and the share of each label that was used (B,), both without gradient.

    Rated answers are what they are; of pairs each is turned around at random by the generator.
    """
    scores, embeddings, labels = reading.scores, reading.embeddings, reading.labels
    if labels is None:
        points, logits, labels = orient_batch(_apart(embeddings), _apart(scores), generator)
        peer_logits = None if reading.peer_scores is None else labels * _apart(reading.peer_scores)
    else:
        points, logits, peer_logits = embeddings, scores, reading.peer_scores
    verdict, rows = known.verdict, known.rows
    batch = RewardBatch(
        points,
        logits,
        labels,
        known.mass,
        known.noise_rate,
        torch.from_numpy(verdict.doubt[rows]).to(logits),
        torch.from_numpy(verdict.believed[rows]).to(logits.device),
        section.transport,
        None if verdict.leads is None else torch.from_numpy(verdict.leads[rows]).to(logits),
        peer_logits,
    )
    loss, kept = OBJECTIVES[section.objective](batch)
    if section.center_rewards_coefficient:
        loss = loss + section.center_rewards_coefficient * torch.add(*scores.chunk(2)).square().mean()
    return loss, batch.margins.detach(), kept


def _apart(sides: torch.Tensor) -> torch.Tensor:
    """Chosen minus rejected, (B, ...), of both (2 * B, ...)."""
    return torch.sub(*sides.chunk(2))


class HeldOutCurve(TrainerCallback):
    """Logs loss and accuracy on held-out rows, whose labels are as noisy as those in training, at even steps."""

    def __init__(self, model: Any, examples: Examples, section: RewardParams, log: Log) -> None:
        self._measure = lambda: measure(score_margins(model, examples, section.batch_size), examples.labels)
        self._evaluations = section.evaluations
        self._log = log

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in evaluation_steps(state.max_steps, self._evaluations):
            figures = {f"held_out_{name}": value for name, value in self._measure().items() if value is not None}
            self._log(figures, state.global_step)


def measure(margins: np.ndarray, labels: np.ndarray | None) -> Mapping[str, float | None]:
    """The figures of pairs, whose labels are None, or of ratings, by how much scores speak for the labels, (rows,)."""
    return measure_margins(margins) if labels is None else measure_ratings(labels * margins, labels)


def measure_margins(margins: np.ndarray) -> dict[str, float]:
    """Accuracy (ties count half), AUROC over both orientations, Bradley-Terry loss and mean of margins (pairs,)."""
    from sklearn.metrics import roc_auc_score

    both = np.concatenate([margins, -margins])
    return {
        "accuracy": float(np.mean((margins > 0) + 0.5 * (margins == 0))),
        "auroc": float(roc_auc_score(np.repeat([1, 0], len(margins)), both)),
        "loss": float(np.mean(np.logaddexp(0, -margins))),
        "margin": float(np.mean(margins)),
    }


@dataclass(frozen=True)
class Job:
    """One model to train: start, data, what is known of its labels, and where the result goes."""

    start: Path | str
    tokenizer: Any
    train: Examples
    test: Examples | None
    noise_rate: float
    model: Path
    verdict: Verdict | None = None


def fit_scorer(section: RewardParams, job: Job, seed: int, log: Log) -> tuple[Any, Ledger]:
    """Train one score model, fold its adapter, save it, and return it with the ledger of its training rows."""
    set_determinism(seed)
    padding = job.tokenizer.pad_token_id
    model: Any = load_fresh_scorer(job.start, padding, section)
    if section.objective in TWINS:
        model.add_module("peer", _load_peer(job, section))
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(section, seed, Path(folder))
        trainer = _build_trainer(section, job, model, settings)
        trainer.section, trainer.noise_rate, trainer.padding = section, job.noise_rate, padding
        trainer.labels = job.train.labels
        trainer.generator = torch.Generator().manual_seed(seed)
        trainer.ledger = Ledger.blank(len(job.train))
        trainer.verdict = job.verdict or Verdict.blank(len(job.train))
        report_curves(trainer, log, trainer.ledger.take_figures)
        if job.test is not None and len(job.test):
            trainer.add_callback(HeldOutCurve(trainer.model, job.test, section, log))
        trainer.train()
    if section.objective in TWINS:
        del model.peer
    sample = pad_batch(job.train.sides[0][:8], padding)
    merged = fold_adapter(trainer.model, section.adapter, sample, lambda: load_fresh_scorer(job.start, padding))
    save_model(merged, job.tokenizer, job.model)
    return merged, trainer.ledger


def _load_peer(job: Job, section: RewardParams) -> Any:
    """A second model from the same start, whose score head is drawn: two equal ones would stay equal."""
    peer: Any = load_fresh_scorer(job.start, job.tokenizer.pad_token_id, section)
    torch.nn.init.normal_(peer.score.weight, std=peer.config.initializer_range)
    return peer


def _build_trainer(section: RewardParams, job: Job, model: Any, settings: dict[str, Any]) -> PairwiseTrainer:
    count, padding = len(job.train), job.tokenizer.pad_token_id
    # By the other two columns TRL knows that nothing is left to tokenise; the answers stay where they are.
    rows = {"row": list(range(count)), "chosen_ids": [[]] * count, "rejected_ids": [[]] * count}

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        numbers = [item["row"] for item in items]
        sequences = [side[number] for side in job.train.sides for number in numbers]
        return {**pad_batch(sequences, padding), "rows": torch.tensor(numbers)}

    return target_modules_named(section.adapter)(PairwiseTrainer)(
        model=model,
        args=RewardConfig(
            **settings,
            num_train_epochs=section.epochs,
            max_length=None,  # longer pairs are left out, and counted, already: TRL would drop them without a word
            remove_unused_columns=False,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_dict(rows),
        processing_class=job.tokenizer,
        peft_config=lora_config(section.adapter, "SEQ_CLS"),
    )
