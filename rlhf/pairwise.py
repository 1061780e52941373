"""Training on preference pairs: the objectives, TRL's reward trainer with its loss replaced, a ledger of the pairs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
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
from rlhf.models import fresh_head_expected, load_scorer, lora_config, save_model, set_determinism, trainer_settings
from rlhf.pairs import Pairs, read_batch, score_margins
from rlhf.params import RewardParams
from rlhf.reward_losses import OBJECTIVES, TWINS, RewardBatch
from rlhf.selective import mass_schedule, orient_batch
from rlhf.training import CurveReporter, evaluation_steps, fold_adapter


@dataclass
class Ledger:
    """What happened to each training pair: its last margin, and the mean share of its label used while dropping."""

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
        """(pairs,) between 0 and 1; 1 for pairs not visited while labels were dropped."""
        return np.where(self.visits > 0, self.kept / np.maximum(self.visits, 1), 1.0)

    def take_figures(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: float(np.mean(values)) for name, values in self.figures.items()}
        self.figures.clear()
        return means


@dataclass(frozen=True)
class Verdict:
    """What is known of the training labels beforehand: `doubt` (pairs,) in nats, `believed` (pairs,) yes or no."""

    doubt: np.ndarray
    believed: np.ndarray

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
    generator: torch.Generator
    ledger: Ledger
    verdict: Verdict
    leads: np.ndarray | None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rows = self._whole(inputs.pop("rows")).cpu().numpy()
        head: Any = self.accelerator.unwrap_model(model)
        scores, embeddings = read_batch(model, head, inputs, self.padding)
        differences = self._whole(torch.sub(*embeddings.detach().chunk(2)))
        margins = self._whole(torch.sub(*scores.chunk(2)))
        section = self.section
        mass = mass_schedule(self.state.epoch or 0.0, section.warmup_epochs, section.ramp_epochs, self.noise_rate)
        points, logits, labels = orient_batch(differences, margins, self.generator)
        peer_logits = None
        if section.objective in TWINS:
            peer_scores, _ = read_batch(head.peer, head.peer, inputs, self.padding)
            peer_logits = labels * self._whole(torch.sub(*peer_scores.chunk(2)))
        batch = RewardBatch(
            points,
            logits,
            labels,
            mass,
            self.noise_rate,
            torch.from_numpy(self.verdict.doubt[rows]).to(margins),
            torch.from_numpy(self.verdict.believed[rows]).to(margins.device),
            section.transport,
            None if self.leads is None else torch.from_numpy(self.leads[rows]).to(margins),
            peer_logits,
        )
        loss, kept = OBJECTIVES[section.objective](batch)
        if section.center_rewards_coefficient:
            sums = self._whole(torch.add(*scores.chunk(2)))
            loss = loss + section.center_rewards_coefficient * sums.square().mean()
        self.ledger.enter(rows, margins.detach().cpu().numpy(), kept.cpu().numpy(), mass)
        # Every process has the loss of the whole batch, but the gradient of its part alone, and these are averaged.
        loss = loss + (self.accelerator.num_processes - 1) * (loss - loss.detach())
        return (loss, {"logits": scores}) if return_outputs else loss

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        """The batch of all processes in their order, of which this process's part alone carries a gradient."""
        if self.accelerator.num_processes == 1:
            return part
        gathered: Any = self.accelerator.gather(part.detach())
        parts = list(gathered.chunk(self.accelerator.num_processes))
        parts[self.accelerator.process_index] = part
        return torch.cat(parts)


class HeldOutCurve(TrainerCallback):
    """Logs loss and accuracy on held-out pairs, whose labels are as noisy as those in training, at even steps."""

    def __init__(self, model: Any, pairs: Pairs, section: RewardParams, log: Log) -> None:
        self._measure = lambda: measure_margins(score_margins(model, pairs, section.batch_size))
        self._evaluations = section.evaluations
        self._log = log

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in evaluation_steps(state.max_steps, self._evaluations):
            self._log({f"held_out_{name}": value for name, value in self._measure().items()}, state.global_step)


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

    start: Path
    tokenizer: Any
    train: Pairs
    test: Pairs | None
    noise_rate: float
    model: Path
    verdict: Verdict | None = None
    leads: np.ndarray | None = None


def fit_scorer(section: RewardParams, job: Job, seed: int, log: Log) -> tuple[Any, Ledger]:
    """Train one score model, fold its adapter, save it, and return it with the ledger of its training pairs."""
    set_determinism(seed)
    model = load_fresh_scorer(job, section)
    if section.objective in TWINS:
        model.add_module("peer", _load_peer(job, section))
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(section, seed, Path(folder))
        trainer = _build_trainer(section, job, model, settings)
        trainer.section, trainer.noise_rate, trainer.padding = section, job.noise_rate, job.tokenizer.pad_token_id
        trainer.generator = torch.Generator().manual_seed(seed)
        trainer.ledger = Ledger.blank(len(job.train))
        trainer.verdict = job.verdict or Verdict.blank(len(job.train))
        trainer.leads = job.leads
        trainer.add_callback(CurveReporter(log, trainer.ledger.take_figures))
        if job.test is not None and len(job.test):
            trainer.add_callback(HeldOutCurve(trainer.model, job.test, section, log))
        trainer.train()
    if section.objective in TWINS:
        del model.peer
    sample = pad_batch(job.train.chosen[:8], job.tokenizer.pad_token_id)
    merged = fold_adapter(trainer.model, section.adapter, sample, lambda: load_fresh_scorer(job))
    if trainer.accelerator.is_main_process:
        save_model(merged, job.tokenizer, job.model)
    return merged, trainer.ledger


def load_fresh_scorer(job: Job, section: RewardParams | None = None) -> Any:
    """The starting model with a score head of zeros: no answer is preferred before a label has been seen."""
    with fresh_head_expected():
        model: Any = load_scorer(job.start, section)
    model.config.pad_token_id = job.tokenizer.pad_token_id
    torch.nn.init.zeros_(model.score.weight)
    return model


def _load_peer(job: Job, section: RewardParams) -> Any:
    """A second model from the same start, whose score head is drawn: two equal ones would stay equal."""
    peer = load_fresh_scorer(job, section)
    torch.nn.init.normal_(peer.score.weight, std=peer.config.initializer_range)
    return peer


def _build_trainer(section: RewardParams, job: Job, model: Any, settings: dict[str, Any]) -> PairwiseTrainer:
    rows = {"chosen_ids": job.train.chosen, "rejected_ids": job.train.rejected, "row": list(range(len(job.train)))}
    padding = job.tokenizer.pad_token_id

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [item["chosen_ids"] for item in items] + [item["rejected_ids"] for item in items]
        return {**pad_batch(sequences, padding), "rows": torch.tensor([item["row"] for item in items])}

    return PairwiseTrainer(
        model=model,
        args=RewardConfig(
            **settings,
            num_train_epochs=section.epochs,
            max_length=None,  # longer pairs are left out, and counted, already: TRL would drop them without a word
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,  # a second model is not part of the first one's forward pass
        ),
        data_collator=collate,
        train_dataset=Dataset.from_dict(rows),
        processing_class=job.tokenizer,
        peft_config=lora_config(section.adapter, "SEQ_CLS"),
    )
