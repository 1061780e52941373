"""`alignflow audit`: wrong labels found in a file, the page, the cleaned copy, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import alignflow
from rlhf import label_audit
from rlhf.data.formats import Row, read_rows, with_ids
from rlhf.errors import UserError
from rlhf.label_audit import LabelAudit, apply_audit, audit_labels, write_audit

WRONG = range(0, 120, 6)


def make_rows(count: int = 120) -> list[Row]:
    """The answer with more of the letter e is better; every sixth label is turned around."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        better, worse = ("".join(generator.choice(list(letters), 30)) for letters in ("eeeeeab", "xxxxxab"))
        if number in WRONG:
            better, worse = worse, better
        rows.append({"prompt": f"q {number % 40}", "chosen": better, "rejected": worse, "source": "web"})
    return with_ids(rows)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{key: value for key, value in row.items() if key != "id"} for row in make_rows()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*words: Any) -> Any:
    return CliRunner().invoke(alignflow.app, ["audit", *map(str, words)])


def test_wrong_labels_are_found_shown_and_put_right(file: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = tmp_path / "audit"
    result = run(file, "--embedder", tiny_model_dir, "--noise-rate", 0.17, "--folder", folder, "--apply")
    assert result.exit_code == 0, result.output
    rows = make_rows()
    wrong = {rows[number]["id"] for number in WRONG}
    with (folder / "audit.csv").open(encoding="utf-8") as lines:
        found = list(csv.DictReader(lines))
    assert {row["id"] for row in found[: len(wrong)]} == wrong
    assert [float(row["right"]) for row in found] == sorted(float(row["right"]) for row in found)
    cleaned, removed = (read_rows(folder / name) for name in ("cleaned.jsonl", "removed.jsonl"))
    assert {row["id"] for row in removed} | {row["id"] for row in cleaned if row.get("relabelled")} == wrong
    assert len(cleaned) + len(removed) == len(rows)
    originals = {row["id"]: row for row in rows}
    for row in cleaned:
        sides = ("rejected", "chosen") if row.get("relabelled") else ("chosen", "rejected")
        assert (row["chosen"], row["rejected"]) == tuple(originals[row["id"]][side] for side in sides)
    assert f"keep {len(rows) - len(wrong)}" in result.output


def test_the_noise_rate_is_estimated_unless_given(file: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    estimated = audit_labels(make_rows(), str(tiny_model_dir), None, "source")
    assert estimated.estimate is not None
    assert estimated.rate == pytest.approx(len(WRONG) / 120, abs=0.05)
    assert estimated.rates.keys() == {"web"}
    assert audit_labels(make_rows(), str(tiny_model_dir), 0.3, None).rate == 0.3


def test_the_page_escapes_what_people_wrote(tmp_path: Path) -> None:
    rows = with_ids([{"prompt": "<script>p</script>", "chosen": "a & b", "rejected": "c"}] * 2)
    write_audit(tmp_path, LabelAudit(rows, np.array([0.05, 0.9]), 3, 0.2, None, ["x", "y"], {"x": 0.4, "y": 0.1}))
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "<script>p" not in page
    assert "&lt;script&gt;p" in page
    assert "a &amp; b" in page
    assert "3 left out" in page
    assert "x 0.40; y 0.10" in page


@pytest.mark.parametrize(("right", "action"), [(0.5, "keep"), (0.49, "drop"), (0.1, "drop"), (0.09, "relabel")])
def test_actions(tmp_path: Path, right: float, action: str) -> None:
    audit = LabelAudit(make_rows(1), np.array([right]), 0, 0.2, None, None, {})
    assert audit.actions() == [action]
    cleaned, removed = apply_audit(tmp_path, audit)
    assert (len(read_rows(cleaned)), len(read_rows(removed))) == ((0, 1) if action == "drop" else (1, 0))


def test_conversations_are_read_and_rows_without_two_texts_are_counted(tiny_model_dir: Path) -> None:
    def turn(role: str, text: str) -> list[Row]:
        return [{"role": role, "content": text}]

    rows = make_rows(10)
    spoken = [
        {**row, "prompt": turn("user", row["prompt"]), **{k: turn("assistant", row[k]) for k in ("chosen", "rejected")}}
        for row in rows
    ]
    broken = [
        {**rows[0], "chosen": None},
        {**rows[0], "rejected": 3},
        {**rows[0], "chosen": "a", "rejected": " a "},
        {**rows[0], "prompt": [{"role": "user"}]},
    ]
    found = audit_labels([*spoken, *broken], str(tiny_model_dir), 0.2, None)
    assert (len(found.rows), found.left_out) == (10, 4)
    np.testing.assert_allclose(found.right, audit_labels(rows, str(tiny_model_dir), 0.2, None).right)


def test_a_long_text_loses_its_beginning(tiny_model_dir: Path) -> None:
    texts = ["x" * 3000 + " end", "y" * 3000 + " end", "x" * 3000 + " the other"]
    first, second, third = label_audit.embed_texts(texts, str(tiny_model_dir))
    assert not np.allclose(first[:-1], third[:-1], atol=1e-4)
    assert first.shape == second.shape
    assert first[-1] == pytest.approx(np.log(1 + len(texts[0])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group", "topic"], "has no 'topic', which --group names; its columns are id, prompt"),
        (["--embedder", "no/such/folder/model"], "is no embedder .* give --embedder a model folder"),
    ],
)
def test_wrong_options_end_in_a_sentence(file: Path, tiny_model_dir: Path, options: list[str], message: str) -> None:
    result = run(file, "--embedder", tiny_model_dir, *options)
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception


def test_rows_without_two_answers_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match="none of the 1 rows has two different texts as answers"):
        audit_labels([{"id": "a", "prompt": "p", "chosen": "x", "rejected": "x"}], str(tiny_model_dir), 0.2, None)
