"""Which preference labels are probably wrong: any preference file, an embedder, no training."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.curves import rounded_number
from rlhf.data.formats import Row, completion_text, write_rows
from rlhf.errors import UserError, first_line
from rlhf.examples import sample_rows
from rlhf.noise import NoiseEstimate, estimate_noise_rate, orient_pairs
from rlhf.trust import trust_labels

if TYPE_CHECKING:
    import numpy as np

Action = Literal["keep", "drop", "relabel"]
RELABEL_BELOW = 0.1
"""A label is turned around rather than dropped where it is right with less probability than this."""
ESTIMATION_PAIRS = 2000
BATCH = 32
ROWS_SHOWN = 1000
"""So many of the most suspicious pairs are on the page; audit.csv has all."""


@dataclass(frozen=True)
class LabelAudit:
    """The rows that could be judged, what is known of each, and of all."""

    rows: list[Row]
    right: np.ndarray
    left_out: int
    rate: float
    estimate: NoiseEstimate | None
    groups: list[str] | None
    rates: dict[str, float]

    def actions(self) -> list[Action]:
        """What to do with each label: keep from .5 on, turn around below RELABEL_BELOW, drop between."""
        return ["keep" if p >= 0.5 else "relabel" if p < RELABEL_BELOW else "drop" for p in self.right.tolist()]


def audit_labels(
    rows: Sequence[Row], embedder: str, noise_rate: float | None, group: str | None, seed: int = 0
) -> LabelAudit:
    """Judge each label of canonical preference rows by all others (rlhf.trust).

    `embedder` is a folder or hub id that `AutoModel` loads; `noise_rate` None is estimated; `group` names a column.
    Rows whose answers are no texts, or the same, are left out and counted.
    Raises UserError where no row is left, the embedder cannot be loaded, or a row lacks the group.
    """
    import numpy as np

    usable = [row for row in rows if _is_usable(row)]
    if not usable:
        raise UserError(f"none of the {len(rows)} rows has two different texts as answers; check its columns")
    groups = None if group is None else [_group_of(row, group) for row in usable]
    texts = [_text(row, side) for row in usable for side in ("chosen", "rejected")]
    numbers: dict[str, int] = {}
    answers = np.array([numbers.setdefault(text, len(numbers)) for text in texts]).reshape(-1, 2)
    embeddings = embed_texts(list(numbers), embedder)
    differences = embeddings[answers[:, 0]] - embeddings[answers[:, 1]]
    estimate = None
    if noise_rate is None:
        sample = sample_rows(len(usable), ESTIMATION_PAIRS, seed)
        prompts = [json.dumps(usable[place]["prompt"]) for place in sample]
        estimate = estimate_noise_rate(*orient_pairs(differences[sample], seed), prompts, seed)
    rate = estimate.rate if estimate else float(noise_rate or 0.0)
    trust = trust_labels(differences, answers, rate, seed, groups)
    return LabelAudit(usable, trust.right, len(rows) - len(usable), rate, estimate, groups, trust.rates)


def embed_texts(texts: Sequence[str], embedder: str) -> np.ndarray:
    """(texts, dimensions + 1): the mean of the last hidden states, and the logarithm of the length.

    A text too long for the model loses its beginning, as the answer stands at the end. Raises UserError where there is
    no such model.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    tokenizer, model = _load_embedder(embedder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512), 512)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    means = np.empty((len(texts), model.config.hidden_size + 1))
    for start in tqdm(range(0, len(order), BATCH), desc="embedding", unit="batch"):
        places = order[start : start + BATCH]
        batch = [texts[place] for place in places]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        means[places, :-1] = ((states * mask).sum(1) / mask.sum(1)).cpu().numpy()
        means[places, -1] = [np.log(1 + len(text)) for text in batch]
    return means


def _load_embedder(embedder: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(embedder)
        model = AutoModel.from_pretrained(embedder).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{embedder} is no embedder ({first_line(error)}); give --embedder a model folder or a hub id"
        ) from error
    tokenizer.truncation_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model


def _is_usable(row: Row) -> bool:
    """Whether prompt and both answers are text or messages, and the answers differ."""
    if not all(_has_words(row.get(name)) for name in ("prompt", "chosen", "rejected")):
        return False
    return completion_text(row["chosen"]).strip() != completion_text(row["rejected"]).strip()


def _has_words(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(
            isinstance(message, dict) and isinstance(message.get("content"), str) for message in value
        )
    return isinstance(value, str)


def _text(row: Row, side: str) -> str:
    return f"{completion_text(row['prompt'])}\n{completion_text(row[side])}"


def _group_of(row: Row, group: str) -> str:
    if row.get(group) is None:
        raise UserError(f"row {row['id']} has no {group!r}, which --group names; its columns are {', '.join(row)}")
    return str(row[group])


def write_audit(folder: Path, audit: LabelAudit) -> None:
    """audit.csv with all pairs, the most suspicious first; audit.html with the first ROWS_SHOWN in full."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    folder.mkdir(parents=True, exist_ok=True)
    actions = audit.actions()
    order = sorted(range(len(audit.rows)), key=lambda place: audit.right[place])
    with (folder / "audit.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "right", "action", "group"])
        for place in order:
            group = audit.groups[place] if audit.groups else ""
            figure = rounded_number(float(audit.right[place]))
            writer.writerow([audit.rows[place]["id"], figure, actions[place], group])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]), trim_blocks=True
    )
    shown = [
        {
            "right": f"{audit.right[place]:.3f}",
            "action": actions[place],
            "group": audit.groups[place] if audit.groups else "",
            **{name: completion_text(audit.rows[place][name]) for name in ("prompt", "chosen", "rejected")},
        }
        for place in order[:ROWS_SHOWN]
    ]
    page = environment.get_template("label_audit.html").render(
        rows=shown, audit=audit, counts=Counter(actions), rates=sorted(audit.rates.items(), key=lambda one: -one[1])
    )
    (folder / "audit.html").write_text(page, encoding="utf-8")


def apply_audit(folder: Path, audit: LabelAudit) -> tuple[Path, Path]:
    """Write cleaned.jsonl (kept rows, and relabelled ones turned around) and removed.jsonl with the rows left out."""
    kept: list[Row] = []
    removed: list[Row] = []
    for row, action in zip(audit.rows, audit.actions(), strict=True):
        if action == "drop":
            removed.append(row)
        elif action == "relabel":
            kept.append({**row, "chosen": row["rejected"], "rejected": row["chosen"], "relabelled": True})
        else:
            kept.append(row)
    cleaned, dropped = folder / "cleaned.jsonl", folder / "removed.jsonl"
    write_rows(cleaned, kept)
    write_rows(dropped, removed)
    return cleaned, dropped
