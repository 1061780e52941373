"""Preference pairs as token ids, and how a reward model reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf.data.formats import Row
from rlhf.encoding import encode_answer, pad_batch

GROUP = 32
"""How many answers of similar length go through the model at once in training."""


@dataclass(frozen=True)
class Pairs:
    """Encoded pairs: `ids` and `prompts` name the rows, `dropped` counts those longer than the limit."""

    ids: list[str]
    prompts: list[str]
    chosen: list[list[int]]
    rejected: list[list[int]]
    dropped: int

    def __len__(self) -> int:
        return len(self.ids)

    def number_answers(self) -> tuple[np.ndarray, list[list[int]]]:
        """(pairs, 2): which of the distinct answers, returned beside it, is the chosen and which the rejected one."""
        known: dict[tuple[int, ...], int] = {}
        places = [
            [known.setdefault(tuple(ids), len(known)) for ids in both]
            for both in zip(self.chosen, self.rejected, strict=True)
        ]
        return np.array(places, dtype=int).reshape(-1, 2), [list(ids) for ids in known]

    def sample(self, count: int, seed: int) -> Pairs:
        """At most `count` pairs drawn without replacement, in their order."""
        rows = sample_rows(len(self), count, seed)
        columns = (self.ids, self.prompts, self.chosen, self.rejected)
        ids, prompts, better, worse = ([column[row] for row in rows] for column in columns)
        return Pairs(ids, prompts, better, worse, self.dropped)


def sample_rows(total: int, count: int, seed: int) -> np.ndarray:
    """At most `count` of the numbers below `total`, drawn without replacement, in order."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def encode_pairs(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Pairs:
    """Encode both answers of each row; a pair with an answer longer than `max_length` tokens is dropped and counted."""
    pairs = Pairs([], [], [], [], 0)
    for row in rows:
        chosen, rejected = (encode_answer(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected"))
        if max(len(chosen), len(rejected)) <= max_length:
            pairs.ids.append(row["id"])
            pairs.prompts.append(json.dumps(row["prompt"], ensure_ascii=False))
            pairs.chosen.append(chosen)
            pairs.rejected.append(rejected)
    return Pairs(pairs.ids, pairs.prompts, pairs.chosen, pairs.rejected, len(rows) - len(pairs))


@contextmanager
def captured_states(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect what the score head of `model` is fed: (batch, tokens, dimensions), the last hidden states only."""
    states: list[torch.Tensor] = []
    handle = model.score.register_forward_pre_hook(lambda _head, inputs: states.append(inputs[0]))
    try:
        yield states
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
        with captured_states(head) as states:
            scores.append(model(**part, use_cache=False).logits.float().squeeze(-1))
        embeddings.append(pool_last(states[0], part["input_ids"], padding).float())
    back = order.argsort()
    return torch.cat(scores)[back], torch.cat(embeddings)[back]


def read_answers(model: Any, sequences: Sequence[list[int]], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (answers,) and embeddings (answers, dimensions) of encoded answers, in the order given."""
    padding = model.config.pad_token_id
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    scores, embeddings = [], []
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = pad_batch([sequences[index] for index in order[start : start + batch_size]], padding)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        with torch.inference_mode():
            batch_scores, batch_embeddings = read_batch(model, model, batch, padding)
        scores.append(batch_scores.cpu())
        embeddings.append(batch_embeddings.cpu())
    model.train(was_training)
    back = np.argsort(order)
    return torch.cat(scores).numpy()[back], torch.cat(embeddings).numpy()[back]


def score_margins(model: Any, pairs: Pairs, batch_size: int) -> np.ndarray:
    """Score of the chosen minus score of the rejected answer, (pairs,)."""
    scores, _ = read_answers(model, [*pairs.chosen, *pairs.rejected], batch_size)
    return scores[: len(pairs)] - scores[len(pairs) :]


def embed_differences(model: Any, pairs: Pairs, batch_size: int) -> np.ndarray:
    """Embedding of the chosen minus embedding of the rejected answer, (pairs, dimensions)."""
    places, answers = pairs.number_answers()
    _, embeddings = read_answers(model, answers, batch_size)
    return embeddings[places[:, 0]] - embeddings[places[:, 1]]
