"""Pairs of answers and rated answers as token ids, and how a reward model reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlhf.data.formats import Row
from rlhf.encoding import encode_answer, pad_batch

GROUP = 32
"""How many answers of similar length go through the model at once in training."""


@dataclass(frozen=True)
class Examples:
    """What a reward model learns from or is measured by: pairs of answers, or rated answers.

    `ids` and `prompts` name the rows; `places` (rows, sides) their answers among the embeddings, of a pair the chosen
    before the rejected one. `sides` holds the encoded answers of each side, nothing where only embeddings are read.
    `labels` (rows,) is 1 for a good and -1 for a bad answer, None for pairs. `dropped` counts rows left out.
    """

    ids: list[str]
    prompts: list[str]
    places: np.ndarray
    sides: list[list[list[int]]]
    labels: np.ndarray | None
    dropped: int

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, count: int, seed: int) -> Examples:
        """At most `count` rows drawn without replacement, in their order."""
        rows = sample_rows(len(self), count, seed)
        ids, prompts, *sides = ([column[row] for row in rows] for column in (self.ids, self.prompts, *self.sides))
        labels = None if self.labels is None else self.labels[rows]
        return Examples(ids, prompts, self.places[rows], sides, labels, self.dropped)

    def turned(self, wrong: np.ndarray) -> Examples:
        """The same rows with the other label where `wrong` (rows,) is true."""
        if self.labels is not None:
            return replace(self, labels=np.where(wrong, -self.labels, self.labels))
        sides = [
            [other if turn else own for turn, own, other in zip(wrong, side, rest, strict=True)]
            for side, rest in zip(self.sides, self.sides[::-1], strict=True)
        ]
        return replace(self, places=np.where(wrong[:, None], self.places[:, ::-1], self.places), sides=sides)

    def points(self, embeddings: np.ndarray) -> np.ndarray:
        """(rows, dimensions): of a rated answer its embedding, of a pair chosen minus rejected."""
        first = embeddings[self.places[:, 0]]
        return first if self.labels is not None else first - embeddings[self.places[:, 1]]

    def margins(self, scores: np.ndarray) -> np.ndarray:
        """(rows,) by how much the scores (sides * rows,), side after side, speak for the labels."""
        if self.labels is not None:
            return self.labels * scores
        return scores[: len(self)] - scores[len(self) :]


def sample_rows(total: int, count: int, seed: int) -> np.ndarray:
    """At most `count` of the numbers below `total`, drawn without replacement, in order."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def encode_sides(tokenizer: Any, rows: Sequence[Row], columns: Sequence[str]) -> list[list[list[int]]]:
    """The answers in each of the columns as token ids."""
    return [[encode_answer(tokenizer, row["prompt"], row[column]) for row in rows] for column in columns]


@contextmanager
def captured_inputs(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the first argument of every call of `module`: of a model's head, its last hidden states."""
    inputs: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def pool_last(states: torch.Tensor, input_ids: torch.Tensor, padding: int) -> torch.Tensor:
    """The states (batch, dimensions) at the token where transformers reads the score: the last that is no padding."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (positions * (input_ids != padding)).argmax(-1)
    return states[torch.arange(len(states), device=states.device), last]


def read_batch(
    model: Any, head: Any, batch: dict[str, torch.Tensor], padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (answers,) and embeddings (answers, dimensions) of one padded batch, with gradients.

    Answers differ much in length, so the batch goes through the model in groups of similar length, each padded to its
    own longest: the same figures for half the work where one long answer would stretch all others. `head` is the
    model that owns the score head, `model` what wraps it.
    """
    lengths = batch["attention_mask"].sum(1)
    order = lengths.argsort(stable=True)
    scores, embeddings = [], []
    for rows in order.split(GROUP):
        longest = int(lengths[rows].max())
        part = {name: value[rows, :longest] for name, value in batch.items()}
        with captured_inputs(head.score) as states:
            scores.append(model(**part, use_cache=False).logits.float().squeeze(-1))
        embeddings.append(pool_last(states[0], part["input_ids"], padding).float())
    back = order.argsort()
    return torch.cat(scores)[back], torch.cat(embeddings)[back]


def read_answers(model: Any, sequences: Sequence[list[int]], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (answers,) and embeddings (answers, dimensions) of encoded answers, in the order given."""
    parts = list(read_in_batches(model, sequences, batch_size))
    back = np.argsort(np.concatenate([places for places, _, _ in parts]))
    scores, embeddings = (np.concatenate([part[kind] for part in parts])[back] for kind in (1, 2))
    return scores, embeddings


def read_in_batches(
    model: Any, sequences: Sequence[list[int]], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The places of `batch_size` answers of similar length, their scores and their embeddings, until all are read."""
    padding = model.config.pad_token_id
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = pad_batch([sequences[index] for index in places], padding)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        with torch.inference_mode():
            scores, embeddings = read_batch(model, model, batch, padding)
        yield np.array(places), scores.cpu().numpy(), embeddings.cpu().numpy()
    model.train(was_training)


def score_margins(model: Any, examples: Examples, batch_size: int) -> np.ndarray:
    """By how much the model's scores speak for each label, (rows,)."""
    scores, _ = read_answers(model, [ids for side in examples.sides for ids in side], batch_size)
    return examples.margins(scores)
