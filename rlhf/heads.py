"""Score heads on frozen embeddings: trained without the transformer, saved with it as an ordinary reward model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import get_scheduler

from rlhf.curves import Log
from rlhf.examples import Examples
from rlhf.models import load_fresh_scorer, save_model, set_determinism
from rlhf.pairwise import Job, Known, Ledger, Reading, Verdict, measure, reward_loss
from rlhf.params import RewardParams
from rlhf.reward_losses import TWINS
from rlhf.selective import mass_schedule
from rlhf.training import evaluation_steps

STEPS_PER_FIGURE = 10
READ_AT_ONCE = 4096


@dataclass(frozen=True)
class Coordinates:
    """Embeddings as a head sees them in training: `x = (z - (c·z) mean) / scale`, and `c·z` itself, c = mean / |mean|².

    All answers share a large mean and their dimensions differ in scale, which makes descent slow. As the map is linear,
    it goes into the weights of the first layer afterwards, and the saved head reads embeddings as they are.
    """

    mean: torch.Tensor
    centre: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, embeddings: torch.Tensor) -> Coordinates:
        mean = embeddings.mean(0)
        centre = mean / mean.square().sum().clamp_min(1e-12)
        scale = (embeddings - (embeddings @ centre)[:, None] * mean).square().mean(0).sqrt()
        return cls(mean, centre, torch.where(scale > 1e-6, scale, 1.0))

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(answers, dimensions) to (answers, dimensions + 1)."""
        along = (embeddings @ self.centre)[:, None]
        return torch.cat([(embeddings - along * self.mean) / self.scale, along], 1)

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        """(outputs, dimensions + 1) to the (outputs, dimensions) that say the same of embeddings as they are."""
        own = weight[:, :-1] / self.scale
        return own + (weight[:, -1] - own @ self.mean)[:, None] * self.centre


def fit_head(section: RewardParams, job: Job, embeddings: np.ndarray, seed: int, log: Log) -> tuple[nn.Module, Ledger]:
    """Train a score head on `embeddings` (answers, dimensions), save it with its transformer, and return it.

    The head reads embeddings as they are: (answers, dimensions) to (answers, 1).
    """
    set_determinism(seed)
    coordinates = Coordinates.of(_read(embeddings, np.unique(job.train.places)))
    head = _fresh_head(embeddings.shape[1] + 1, section.hidden)
    ledger = Ledger.blank(len(job.train))
    _descend(section, job, _Reader(embeddings, coordinates, head), (ledger, seed, log))
    first: Any = head[0]
    folded = nn.Linear(embeddings.shape[1], first.out_features, bias=first.bias is not None)
    with torch.no_grad():
        folded.weight.copy_(coordinates.fold(first.weight))
        if first.bias is not None:
            folded.bias.copy_(first.bias)
    head[0] = folded
    _save(head, section.hidden, job)
    return head, ledger


def score_embedded(head: nn.Module, examples: Examples, embeddings: np.ndarray) -> np.ndarray:
    """By how much a trained head speaks for each label, (rows,)."""
    places = examples.places.T.ravel()
    with torch.inference_mode():
        parts = [
            head(_read(embeddings, places[start : start + READ_AT_ONCE])).squeeze(-1)
            for start in range(0, len(places), READ_AT_ONCE)
        ]
    return examples.margins(torch.cat(parts).numpy())


def _read(embeddings: np.ndarray, places: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(embeddings[places], dtype=np.float32))


def _fresh_head(inputs: int, hidden: list[int]) -> nn.Sequential:
    """Linear without a bias, or a perceptron; the last layer is zero, so that no answer is preferred at first."""
    from rlhf.mlp_scorer import build_head

    head = build_head([inputs, *hidden]) if hidden else nn.Sequential(nn.Linear(inputs, 1, bias=False))
    for parameter in head[-1].parameters():
        nn.init.zeros_(parameter)
    return head


# descent ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """A head in training, its coordinates and what it reads."""

    embeddings: np.ndarray
    coordinates: Coordinates
    head: nn.Module

    def __call__(self, places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (sides * rows,), side after side, and embeddings of answers at `places` (rows, sides)."""
        answers = _read(self.embeddings, places.T.ravel())
        return self.head(self.coordinates(answers)).squeeze(-1), answers

    def margins(self, examples: Examples) -> np.ndarray:
        with torch.inference_mode():
            return examples.margins(self(examples.places)[0].numpy())


def _descend(section: RewardParams, job: Job, read: _Reader, record: tuple[Ledger, int, Log]) -> None:
    """As the trainer of whole models goes: AdamW, gradients clipped, figures every few steps, held-out at even ones."""
    ledger, seed, log = record
    generator = torch.Generator().manual_seed(seed)
    verdict = job.verdict or Verdict.blank(len(job.train))
    per_epoch = math.ceil(len(job.train) / section.batch_size)
    updates = math.ceil(per_epoch / section.gradient_accumulation_steps)
    total = math.ceil(section.epochs * updates)
    peer = _peer_of(read, section)
    parameters = [*read.head.parameters(), *(peer.head.parameters() if peer else ())]
    optimiser = torch.optim.AdamW(parameters, section.learning_rate, weight_decay=section.weight_decay)
    scheduler = get_scheduler(section.lr_scheduler, optimiser, math.ceil(section.warmup_share * total), total)
    measured = evaluation_steps(total, section.evaluations) if job.test is not None else set()
    batches = _batches(len(job.train), section.batch_size, generator)
    for step in range(1, total + 1):
        epoch, place = divmod(step - 1, updates)
        parts = min(section.gradient_accumulation_steps, per_epoch - place * section.gradient_accumulation_steps)
        mass = mass_schedule(epoch + place / updates, section.warmup_epochs, section.ramp_epochs, job.noise_rate)
        for rows in itertools.islice(batches, parts):
            scores, embeddings = read(job.train.places[rows])
            labels = None if job.train.labels is None else torch.from_numpy(job.train.labels[rows]).to(scores)
            peer_scores = peer(job.train.places[rows])[0] if peer else None
            reading = Reading(scores, embeddings, labels, peer_scores)
            loss, margins, kept = reward_loss(section, reading, Known(verdict, rows, mass, job.noise_rate), generator)
            (loss / parts).backward()
            ledger.enter(rows, margins.numpy(), kept.numpy(), mass)
        nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()
        if step % STEPS_PER_FIGURE == 0 or step == total:
            log({"learning_rate": float(scheduler.get_last_lr()[0]), **ledger.take_figures()}, step)
        if job.test is not None and step in measured:
            figures = measure(read.margins(job.test), job.test.labels)
            log({f"held_out_{name}": value for name, value in figures.items() if value is not None}, step)


def _peer_of(read: _Reader, section: RewardParams) -> _Reader | None:
    """The second head of objectives that have one; its last layer is drawn, as two equal heads would stay equal."""
    if section.objective not in TWINS:
        return None
    head = _fresh_head(read.embeddings.shape[1] + 1, section.hidden)
    for parameter in head[-1].parameters():
        nn.init.normal_(parameter, std=0.02)
    return replace(read, head=head)


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """The rows of one batch after another, in a new order every epoch, without end."""
    while True:
        for rows in torch.randperm(count, generator=generator).split(size):
            yield rows.numpy()


# saving -------------------------------------------------------------------------------------------


def _save(head: nn.Sequential, hidden: list[int], job: Job) -> None:
    """The head in the transformer's own place for one, or, where it has hidden layers, in a class of ours."""
    model: Any = load_fresh_scorer(job.start, job.tokenizer.pad_token_id)
    if not hidden:
        with torch.no_grad():
            model.score.weight.copy_(head[0].weight)
        save_model(model, job.tokenizer, job.model)
        return
    from rlhf.mlp_scorer import MLPScorerConfig, MLPScorerForSequenceClassification

    backbone = {name: value for name, value in model.base_model.config.to_dict().items() if name != "_name_or_path"}
    with torch.device("meta"):  # its layers are replaced at once, so they need no memory
        scorer = MLPScorerForSequenceClassification(MLPScorerConfig(backbone, hidden))
    scorer.backbone, scorer.score = model.base_model, head
    save_model(scorer, job.tokenizer, job.model)
