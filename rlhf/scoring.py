"""What a reward is, the reward model as one, the weighted sum, and the contract that a reward model must keep."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from rlhf.data.formats import Row
from rlhf.encoding import encode_answer, pad_batch
from rlhf.errors import UserError, brief, first_line
from rlhf.models import load_scorer, load_tokenizer, on_device

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Sequence[float]]
"""`f(prompts, completions, **columns)`, one number per completion; columns are lists beside the prompts."""


@dataclass(frozen=True)
class Reward:
    """A reward function, its name in curves, its weight in the sum, and what it asks of the rows beforehand."""

    name: str
    function: RewardFunction
    weight: float
    check: Callable[[Sequence[Row]], None] | None = None


# reward model -------------------------------------------------------------------------------------


class RewardModel:
    """A saved reward model as a function of texts: the score of an answer never depends on its neighbours."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        """Load the model. Raises UserError where the folder holds none with one score per text."""
        _check_is_scorer(folder)
        self.tokenizer: Any = load_tokenizer(folder)
        self.model: Any = on_device(load_scorer(folder))
        self.batch_size = batch_size
        self._warned = False

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """One score per answer, in the order given; texts or messages, read as the model was trained to read them.

        A text longer than the model's context is scored by its end, with a warning: one rambling answer must not
        stop a training that is meant to unlearn it.
        """
        return self.score_ids(
            [self.encode(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
        )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """The same with the signature of a reward function."""
        return self.score(prompts, completions)

    def encode(self, prompt: Any, answer: Any) -> list[int]:
        """Prompt, answer and end token; the last tokens of them where the context does not hold all."""
        ids = encode_answer(self.tokenizer, prompt, answer)
        limit = getattr(self.model.config, "max_position_embeddings", None) or len(ids)
        if len(ids) > limit and not self._warned:
            logger.warning(
                "an answer of %d tokens is scored by its last %d, all that the reward model reads", len(ids), limit
            )
            self._warned = True
        return ids[-limit:]

    def score_ids(self, sequences: Sequence[Sequence[int]], left: bool = False) -> list[float]:
        """Scores of token sequences, batched by length; `left` pads on the left, for the hand-over check."""
        import torch

        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        scores = [0.0] * len(sequences)
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                batch = pad_batch([sequences[index] for index in chosen], self.tokenizer.pad_token_id)
                batch = self._pad_left(batch) if left else batch
                logits = self.model(**{name: value.to(self.model.device) for name, value in batch.items()}).logits
                for index, value in zip(chosen, logits.float().squeeze(-1).tolist(), strict=True):
                    scores[index] = value
        return scores

    def _pad_left(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same batch with its padding moved to the left, positions counted from the first real token."""
        import torch

        gaps = (batch["attention_mask"] == 0).sum(1).tolist()
        moved = {
            name: torch.stack([row.roll(gap) for row, gap in zip(rows, gaps, strict=True)])
            for name, rows in batch.items()
        }
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            moved["position_ids"] = (moved["attention_mask"].cumsum(1) - 1).clamp_min(0)
        return moved


def find_reward_model(name: str) -> Path:
    """The folder of that name, else that of the hub's model, fetched where it is not here yet.

    Raises UserError where there is neither.
    """
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} is no folder and no model that the hub gives ({first_line(error)}); "
            "give a folder that the stage reward wrote, or a hub id"
        ) from None


def _check_is_scorer(folder: Path) -> None:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} holds no reward model (no config.json); give prepare.data.preferences a source")
    config = json.loads(path.read_text(encoding="utf-8"))
    kinds = config.get("architectures") or ["a model of no known kind"]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(
            f"{folder} holds {', '.join(kinds)}, not a reward model; give a folder that the stage reward wrote"
        )
    # transformers leaves the labels out of config.json where there are two.
    labels = len(config.get("id2label", ("no", "yes")))
    if labels != 1:
        raise UserError(f"the reward model in {folder} has {labels} labels, not 1; train it with num_labels=1")


# hand-over ----------------------------------------------------------------------------------------

TOLERANCE = 1e-3
"""How far a score may move with batch, padding side and neighbours, in units of the scores' spread (at least 1)."""


def check_reward_model(folder: Path, rows: Sequence[Row], columns: Sequence[str] = ("chosen", "rejected")) -> None:
    """The hand-over contract: one finite score per answer, whatever stands beside it and wherever the padding is.

    `columns` of the rows hold answers. Raises UserError naming the part of the contract that is broken.
    """
    model = RewardModel(folder, batch_size=1)
    sequences = [model.encode(row["prompt"], row[column]) for row in rows for column in columns]
    if not sequences:
        raise UserError(f"there is no answer to check the reward model in {folder} with; raise test_share")
    alone = model.score_ids(sequences)
    if not all(math.isfinite(score) for score in alone):
        raise UserError(f"the reward model in {folder} gives scores that are not finite; lower reward.learning_rate")
    spread = max(1.0, max(alone) - min(alone))
    # The longest text once more at the head of itself, so that all others are padded even where all are equally long.
    longest = max(sequences, key=len)
    limit = getattr(model.model.config, "max_position_embeddings", None) or 2 * len(longest)
    model.batch_size = len(sequences) + 1
    crowd = [*sequences, (longest * 2)[-limit:]]
    variants = {
        "batch size": model.score_ids(sequences),
        "neighbours": model.score_ids(crowd)[:-1],
        "padding side": model.score_ids(crowd, left=True)[:-1],
    }
    for name, scores in variants.items():
        drift = max(abs(score - other) for score, other in zip(alone, scores, strict=True)) / spread
        if not drift <= TOLERANCE:
            raise UserError(
                f"the score of the reward model in {folder} depends on {name} (by {drift:.1e} of its spread); "
                "its padding token or attention mask is not heeded: check pad_token_id in its config.json"
            )


def check_same_tokenizer(policy: Path, reward: Path) -> None:
    """Raise UserError, naming the first difference, where the reward model splits text otherwise than the policy."""
    if difference := tokenizer_difference(policy, reward):
        raise UserError(
            f"the tokenizers of policy and reward model differ: {difference}; "
            "train the reward model from the same SFT model"
        )


def tokenizer_difference(policy: Path, reward: Path) -> str | None:
    """The first thing in which two folders' tokenizers differ, in words; None where they split all text alike."""
    found = [_describe_tokenizer(load_tokenizer(folder)) for folder in (policy, reward)]
    for name, ours in found[0].items():
        theirs = found[1][name]
        if ours == theirs:
            continue
        if isinstance(ours, dict):
            name = min(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
            ours, theirs, name = ours.get(name), theirs.get(name), f"id of the token {name!r}"
        return f"the {name} is {brief(repr(ours), 40)} in {policy} but {brief(repr(theirs), 40)} in {reward}"
    return None


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What decides how a text is split, in the order in which a difference is reported."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    return {
        "vocabulary size": len(tokenizer),
        "end token": tokenizer.eos_token,
        "padding token": tokenizer.pad_token,
        "vocabulary": tokenizer.get_vocab(),
        "chat template": tokenizer.chat_template,
        **{part.replace("_", "-"): json.dumps(backend.get(part)) for part in ("normalizer", "pre_tokenizer", "model")},
    }


# mix ----------------------------------------------------------------------------------------------


def check_rows(rewards: Sequence[Reward], rows: Sequence[Row]) -> None:
    """Refuse, before anything is trained, rows that a reward cannot judge answers to."""
    for reward in rewards:
        if reward.check:
            reward.check(rows)


def mixed_reward(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> tuple[list[float], dict[str, list[float]]]:
    """The weighted sum per answer, and each reward's own values by name.

    Raises UserError, naming the reward, where a function fails or does not return exactly one finite number per answer.
    """
    # Columns of these names would collide with the two arguments.
    others = {name: list(values) for name, values in columns.items() if name not in ("prompts", "completions")}
    parts = {
        reward.name: _checked(reward, _called(reward, list(prompts), list(completions), others), completions)
        for reward in rewards
    }
    total = [sum(reward.weight * parts[reward.name][row] for reward in rewards) for row in range(len(completions))]
    return total, parts


def _called(reward: Reward, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]) -> Any:
    try:
        return reward.function(prompts, completions, **columns)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the reward `{reward.name}` failed ({type(error).__name__}: {first_line(error)}); "
            "mend the function or the column that it reads; --debug shows where"
        ) from error


def _checked(reward: Reward, values: Any, completions: Sequence[Any]) -> list[float]:
    if not isinstance(values, Sequence) or len(values) != len(completions):
        found = f"{len(values)} values" if isinstance(values, Sequence) else type(values).__name__
        raise UserError(
            f"the reward `{reward.name}` returned {found} for {len(completions)} answers; one number each is due"
        )
    for value, completion in zip(values, completions, strict=True):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(
                f"the reward `{reward.name}` is {value!r} for the answer {brief(repr(completion), 40)}; "
                "a finite number is due"
            )
    return [float(value) for value in values]
