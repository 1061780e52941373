"""A text classifier that needs no GPU and no network: TF-IDF and logistic regression, kept as JSON and NPZ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.data.formats import Row
from rlhf.errors import UserError

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

SETTINGS, WEIGHTS = "tfidf.json", "tfidf.npz"


class TextClassifier:
    """A saved classifier; `labels` in the order of its columns."""

    def __init__(self, folder: Path) -> None:
        """Load it. Raises UserError where the folder's files are not those that `train_text_classifier` writes."""
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            with np.load(folder / WEIGHTS, allow_pickle=False) as weights:
                self._coefficients, self._intercepts = weights["coefficients"], weights["intercepts"]
                idf = weights["idf"]
            self.labels: list[str] = settings["labels"]
            vocabulary = {term: place for place, term in enumerate(settings["terms"])}
            self._vectoriser = _vectoriser(settings["ngrams"], None, vocabulary)
            self._vectoriser.idf_ = idf
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} holds no classifier of ours ({type(error).__name__}: {error}); train it again"
            ) from None

    def log_odds(self, texts: Sequence[str]) -> np.ndarray:
        """Log p − log(1 − p) of each label: (texts, labels)."""
        scores = self._vectoriser.transform(texts) @ self._coefficients.T + self._intercepts
        return exclusive_log_odds(np.hstack([np.zeros_like(scores), scores]) if len(self.labels) == 2 else scores)


def exclusive_log_odds(logits: np.ndarray) -> np.ndarray:
    """Log p − log(1 − p) where p is the softmax of a row of logits: (texts, labels), two labels or more."""
    columns = [
        logits[:, place] - np.logaddexp.reduce(np.delete(logits, place, axis=1), axis=1)
        for place in range(logits.shape[1])
    ]
    return np.stack(columns, axis=1)


def train_text_classifier(
    rows: Sequence[Row], folder: Path, *, ngrams: int, features: int, inverse_penalty: float
) -> None:
    """Learn `label` from `text` of all rows, and write the classifier into `folder`: the same bytes for the same rows.

    Terms are lower-case words and up to `ngrams` of them in a row, the `features` most frequent ones; their counts are
    taken logarithmically. `inverse_penalty` is scikit-learn's C. Raises UserError where a row lacks text or label, or
    where there is but one label.
    """
    from sklearn.linear_model import LogisticRegression

    faulty = next((place for place, row in enumerate(rows, 1) if not _is_sound(row)), None)
    if faulty:
        raise UserError(f"row {faulty} has no `text` and `label`, both texts; give the classifier rows with both")
    labels = sorted({row["label"] for row in rows})
    if len(labels) < 2:
        raise UserError(f"all rows have the label {', '.join(labels) or '(none)'}; a classifier needs two or more")
    vectoriser = _vectoriser(ngrams, features, None)
    counts = vectoriser.fit_transform([row["text"] for row in rows])
    model = LogisticRegression(C=inverse_penalty, max_iter=1000).fit(counts, [row["label"] for row in rows])
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"labels": labels, "ngrams": ngrams, "terms": vectoriser.get_feature_names_out().tolist()}
    (folder / SETTINGS).write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")
    np.savez(folder / WEIGHTS, idf=vectoriser.idf_, coefficients=model.coef_, intercepts=model.intercept_)


def measure_text_classifier(rows: Sequence[Row], folder: Path) -> float:
    """The share of rows whose `label` the classifier in `folder` finds the likeliest for their `text`."""
    classifier = TextClassifier(folder)
    places = classifier.log_odds([row["text"] for row in rows]).argmax(axis=1)
    return float(np.mean([classifier.labels[place] == row["label"] for place, row in zip(places, rows, strict=True)]))


def _vectoriser(ngrams: int, features: int | None, vocabulary: dict[str, int] | None) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        ngram_range=(1, ngrams), max_features=features, vocabulary=vocabulary, sublinear_tf=True, dtype=np.float64
    )


def _is_sound(row: Row) -> Any:
    return all(isinstance(row.get(name), str) for name in ("text", "label"))
