"""A workspace for the stage `validate`: a tokenizer of forty words, sound rows, limits, and the stage itself."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.curves import no_log
from rlhf.data.expectations import open_context
from rlhf.data.formats import Row, read_rows, with_ids, write_rows
from rlhf.data.quarantine import Outcome, Yardstick, quarantined_rows, read_prepared, sift_rows
from rlhf.models import load_tokenizer
from rlhf.params import DataParams, Params, PrepareParams, QualityParams, RewardParams, ValidateParams, WorldSource
from tasks.paths import Paths
from tasks.validate import run

CHAT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.content }} {% endfor %}"
)
WORDS = [f"w{number}" for number in range(40)]


def quality(rows: int | None = None, **changes: Any) -> QualityParams:
    """Limits of the checks of quality; those that are not given are null."""
    values = {name: changes.get(name, {}) for name in QualityParams.model_fields if name != "rows"}
    return QualityParams.model_validate(
        {"rows": rows} | {name: {"warn": None, "stop": None} | own for name, own in values.items()}
    )


def limits(**changes: Any) -> ValidateParams:
    values: dict[str, Any] = {
        "max_quarantined_share": 1.0,
        "max_prompt_tokens": 8,
        "max_completion_tokens": 8,
        "min_rows": 1,
        "max_duplicate_share": 1.0,
        "max_contradiction_share": 1.0,
        "max_length_bias": 1.0,
        "quality": quality(),
    }
    return ValidateParams(**values | changes)


def make_workspace(root: Path) -> Paths:
    """A workspace with a base model's tokenizer (a word is a token) and configuration, and sound rows of each kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    paths = Paths(root)
    words = ["<unk>", "<eos>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", chat_template=CHAT)
    fast.save_pretrained(paths.model("base"))
    (paths.model("base") / "config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": 12}', encoding="utf-8"
    )
    for kind in ("sft", "preferences", "prompts"):
        put(
            paths,
            kind,
            [sound(kind, number) for number in range(12)],
            [sound(kind, number) for number in range(20, 24)],
        )
    return paths


def turns(*contents: Any, role: str = "user") -> list[Row]:
    return [{"role": role, "content": content} for content in contents]


def sound(kind: str, number: int) -> Row:
    answers: dict[str, Row] = {"sft": {"completion": "w1 w2"}, "preferences": {"chosen": "w1", "rejected": "w2 w3"}}
    return {"prompt": f"w{number} w5"} | answers.get(kind, {"answer": str(number)})


def put(paths: Paths, kind: str, train: list[Row], test: list[Row]) -> None:
    for split, rows in (("train", train), ("test", test)):
        write_rows(paths.prepared / kind / f"{split}.jsonl", with_ids(rows))


def add(paths: Paths, kind: str, *rows: Row) -> None:
    path = paths.prepared / kind / "train.jsonl"
    write_rows(path, [*read_rows(path), *with_ids(rows)])


def check(paths: Paths, preferences: bool = True, **changes: Any) -> dict[str, Any]:
    """Run the stage with the given limits and return its metrics."""
    world = WorldSource(kind="world")
    data = DataParams(
        sft=world,
        preferences=world if preferences else None,
        ratings=None,
        prompts=world,
        votes="keep",
        system=None,
        form=None,
    )
    params = Params.model_construct(
        prepare=PrepareParams.model_construct(data=data),
        validate_=limits(**changes),
        reward=RewardParams.model_construct(ratings=None),
    )
    run(params, paths, no_log)
    return json.loads(paths.metrics("validate").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Sifted(Outcome):
    quarantined: list[Row]


def sift(paths: Paths, kind: str, scale: tuple[float, float] | None = None, **changes: Any) -> Sifted:
    """Judge one kind alone, which is faster than the stage."""
    with tempfile.TemporaryDirectory() as folder:
        context = open_context(Path(folder))
        yardstick = Yardstick(limits(**changes), load_tokenizer(paths.model("base")), 12, context, scale)
        rows = read_prepared(paths.prepared / kind, paths.root)
        outcome = sift_rows(rows, kind, yardstick)
        broken = list(quarantined_rows(rows, outcome))
    return Sifted(outcome.reasons, outcome.prompts, outcome.metrics, outcome.problems, broken)


def reasons(paths: Paths, kind: str) -> list[str]:
    return [row["reason"] for row in read_rows(paths.quarantine / f"{kind}.jsonl")]
