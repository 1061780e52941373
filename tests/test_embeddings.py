"""The stage embed: what it writes, that it writes the same twice, and what it leaves out."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.data.formats import Row, with_ids, write_rows
from rlhf.embeddings import EmbedFiles, embed_answers, load_places, load_vectors
from rlhf.encoding import encode_answer
from rlhf.errors import UserError
from rlhf.examples import read_answers
from rlhf.ledger import Ledger
from rlhf.models import load_fresh_scorer, load_tokenizer, save_model
from rlhf.params import EmbedParams, LedgerParams

PAIRS = with_ids(
    [
        {"prompt": "Ben has 3 pens.\n", "chosen": "3", "rejected": "I am not sure"},
        {"prompt": "Ben has 3 pens.\n", "chosen": "4", "rejected": "3"},
        {"prompt": "Ann has 8 pens.\n", "chosen": "8", "rejected": "no " * 60},
    ]
)
RATINGS = with_ids([{"prompt": "Ben has 3 pens.\n", "completion": "3", "score": 4}])


def embed(folder: Path, model: Path, rows: dict[str, list[Row]] | None = None, **changes: Any) -> dict[str, Any]:
    rows = {"preferences": PAIRS, "ratings": RATINGS} if rows is None else rows
    for kind in ("preferences", "ratings"):
        for split in ("train", "test"):
            write_rows(folder / kind / f"{split}.jsonl", rows.get(kind, []))
    values = {"model": "sft", "max_length": 64, "batch_size": 2, "precision": "fp32"} | changes
    ledger = Ledger(LedgerParams(on_too_long="drop", max_lost_share=1.0))
    return embed_answers(EmbedParams(**values), EmbedFiles(model, folder, folder / "out", folder / "report"), ledger)


def test_every_distinct_answer_is_embedded_once(tmp_path: Path, tiny_model_dir: Path) -> None:
    metrics = embed(tmp_path, tiny_model_dir)
    assert (metrics["answers"], metrics["dimensions"]) == (3, 16)
    account = metrics["ledger"]["preferences/train"]
    assert (account["read"], account["used"], account["dropped"]) == (3, 2, {"too_long": 1})
    places = load_places(tmp_path / "out", "preferences", "train")
    assert places == {PAIRS[0]["id"]: [0, 1], PAIRS[1]["id"]: [2, 0]}
    assert load_places(tmp_path / "out", "ratings", "test") == {RATINGS[0]["id"]: [0]}
    tokenizer: Any = load_tokenizer(tiny_model_dir)
    sequences = [encode_answer(tokenizer, PAIRS[0]["prompt"], text) for text in ("3", "I am not sure", "4")]
    _, expected = read_answers(load_fresh_scorer(tiny_model_dir, tokenizer.pad_token_id), sequences, 1)
    np.testing.assert_allclose(load_vectors(tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)
    with (tmp_path / "report" / "lengths.csv").open() as file:
        assert sum(int(row["rows"]) for row in csv.DictReader(file)) == 8


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, tiny_model_dir: Path) -> None:
    for name in ("a", "b"):
        embed(tmp_path / name, tiny_model_dir)
    for path in (tmp_path / "a" / "out").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_embeddings_stay_on_the_disk(tmp_path: Path, tiny_model_dir: Path) -> None:
    embed(tmp_path, tiny_model_dir)
    assert isinstance(load_vectors(tmp_path / "out"), np.memmap)


def test_nothing_to_embed_is_nothing_to_complain_about(tmp_path: Path, tiny_model_dir: Path) -> None:
    metrics = embed(tmp_path, tiny_model_dir, {})
    assert metrics["answers"] == 0
    assert load_places(tmp_path / "out", "preferences", "train") == {}


def test_a_split_without_a_row_that_fits_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"3 rows, 3 of them longer than 4 tokens .* raise it"):
        embed(tmp_path, tiny_model_dir, max_length=4)
    long = with_ids([{"prompt": "Ann\n", "completion": "no " * 120, "score": 1}])
    with pytest.raises(UserError, match="1 of them longer than 128 tokens"):
        embed(tmp_path, tiny_model_dir, {"ratings": long}, max_length=1000)


def test_fewer_bits_change_little(tmp_path: Path, tiny_model_dir: Path) -> None:
    for precision in ("fp32", "bf16"):
        embed(tmp_path / precision, tiny_model_dir, precision=precision)
    whole, rounded = (load_vectors(tmp_path / precision / "out") for precision in ("fp32", "bf16"))
    assert not np.array_equal(whole, rounded)
    np.testing.assert_allclose(whole, rounded, atol=0.1)


def test_a_model_that_reads_no_last_token_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    from transformers import BertConfig, BertModel

    tokenizer: Any = load_tokenizer(tiny_model_dir)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    save_model(BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)), tokenizer, tmp_path / "bert")
    with pytest.raises(UserError, match="BertForSequenceClassification, which scores no text by its last token"):
        embed(tmp_path, tmp_path / "bert")
