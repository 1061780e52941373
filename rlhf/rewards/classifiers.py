"""Rewards by a text classifier, of transformers or of ours: how probable a label of an answer is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from rlhf.data.formats import completion_text
from rlhf.errors import UserError, first_line
from rlhf.rewards.tfidf import SETTINGS, TextClassifier, exclusive_log_odds


class Classifier(Protocol):
    """Texts in, log p − log(1 − p) of each label out: (texts, labels)."""

    labels: list[str]

    def log_odds(self, texts: Sequence[str]) -> np.ndarray: ...


class ClassifierScore:
    """The probability of one label, in [0, 1], or its logit log p − log(1 − p)."""

    def __init__(
        self,
        classifier: Classifier,
        label: str | int,
        output: Literal["probability", "logit"],
        reads: Literal["answer", "prompt_and_answer"],
    ) -> None:
        """Raises UserError where the classifier has no such label."""
        self._classifier = classifier
        self._place = _place_of(label, classifier.labels)
        self._output = output
        self._reads = reads

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        texts = [completion_text(completion) for completion in completions]
        if self._reads == "prompt_and_answer":
            texts = [_beside(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        if not texts:
            return []
        odds = self._classifier.log_odds(texts)[:, self._place].astype(np.float64)
        return (odds if self._output == "logit" else np.exp(-np.logaddexp(0.0, -odds))).tolist()


class SequenceClassifier:
    """A classifier of transformers, from a folder or the hub; of a text beyond its context it reads the end."""

    def __init__(self, model: str, batch_size: int) -> None:
        """Load it. Raises UserError where there is none."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from rlhf.models import on_device

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, truncation_side="left")
            self._model: Any = on_device(AutoModelForSequenceClassification.from_pretrained(model).eval())
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"the classifier {model} does not load ({first_line(error)}); give a folder that "
                "AutoModelForSequenceClassification or train_text_classifier wrote, or a hub id"
            ) from None
        config = self._model.config
        self.labels: list[str] = [config.id2label[place] for place in sorted(config.id2label)]
        self._independent = config.problem_type == "multi_label_classification" or len(self.labels) == 1
        self._context = min(getattr(config, "max_position_embeddings", 512), self._tokenizer.model_max_length)
        self._batch_size = batch_size

    def log_odds(self, texts: Sequence[str]) -> np.ndarray:
        """By softmax over the labels; by label where the classifier was trained on several labels of one text."""
        import torch

        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), self._batch_size):
                # An empty text would be no token at all with some tokenizers.
                chosen = [text or " " for text in texts[start : start + self._batch_size]]
                batch = self._tokenizer(
                    chosen, padding=True, truncation=True, max_length=self._context, return_tensors="pt"
                )
                parts.append(self._model(**batch.to(self._model.device)).logits.float().cpu().numpy())
        logits = np.concatenate(parts)
        return logits if self._independent else exclusive_log_odds(logits)


def load_classifier(model: str, root: Path, batch_size: int) -> Classifier:
    """The classifier in the folder `model`, relative to `root`, else that of the hub with this name."""
    folder = root / model
    if (folder / SETTINGS).exists():
        return TextClassifier(folder)
    return SequenceClassifier(str(folder) if folder.exists() else model, batch_size)


def _place_of(label: str | int, labels: Sequence[str]) -> int:
    if isinstance(label, int) and label < len(labels):
        return label
    if label in labels:
        return labels.index(str(label))
    raise UserError(f"the classifier has no label {label!r}; it has {', '.join(labels)}")


def _beside(prompt: Any, answer: str) -> str:
    """A text goes on in its answer; an answer to messages stands on a line of its own."""
    return prompt + answer if isinstance(prompt, str) else f"{completion_text(prompt)}\n{answer}"
