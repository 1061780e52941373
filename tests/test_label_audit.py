"""`alignflow audit`: wrong labels found in a file, the page, the cleaned copy, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

import alignflow
from rlhf import label_audit
from rlhf.audit_report import CUT, LabelAudit, sample_suspects, write_audit
from rlhf.data.formats import Row, read_rows, with_ids
from rlhf.errors import UserError
from rlhf.label_audit import AuditedRows, apply_audit, audit_labels
from rlhf.neighbours import Contradictions, find_contradictions
from rlhf.trust import Trust

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


def test_the_model_inside_a_package_embeds(
    file: Path, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_embedder"
    shutil.copytree(tiny_model_dir, package / "model")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    texts = ["one", "two words"]
    packaged = label_audit.embed_texts(texts, "package:some_embedder")
    np.testing.assert_array_equal(packaged, label_audit.embed_texts(texts, str(tiny_model_dir)))
    result = run(file, "--embedder", "package:no_such_embedder", "--folder", tmp_path / "audit")
    assert result.exit_code == 1
    assert re.search("no such package with a model in it; .* run `make minilm`", str(result.exception or result.output))


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
    found = read_table(folder)
    assert {row["id"] for row in found[: len(wrong)]} == wrong
    assert [row["wrong"] for row in found] == sorted((row["wrong"] for row in found), reverse=True)
    originals = {row["id"]: row for row in rows}
    for row in found:
        assert {name: row[name] for name in ("prompt", "chosen", "rejected")}.items() <= originals[row["id"]].items()
        assert set(row["contradicting_ids"]) <= originals.keys() - {row["id"]}
        assert min(3, row["contradicting"]) == len(row["contradicting_ids"])
    assert np.mean([row["contradicting"] for row in found[: len(wrong)]]) > 5
    assert np.mean([row["called_wrong"] for row in found[: len(wrong)]]) > 0.9
    cleaned, removed = (read_rows(folder / name) for name in ("cleaned.jsonl", "removed.jsonl"))
    assert {row["id"] for row in removed} | {row["id"] for row in cleaned if row.get("relabelled")} == wrong
    assert len(cleaned) + len(removed) == len(rows)
    for row in cleaned:
        sides = ("rejected", "chosen") if row.get("relabelled") else ("chosen", "rejected")
        assert (row["chosen"], row["rejected"]) == tuple(originals[row["id"]][side] for side in sides)
    assert f"keep {len(rows) - len(wrong)}" in result.output


def read_table(folder: Path) -> list[Row]:
    return pyarrow.parquet.read_table(folder / "audit.parquet").to_pylist()


def test_the_noise_rate_is_estimated_unless_given(tiny_model_dir: Path) -> None:
    estimated = audit_labels(make_rows(), str(tiny_model_dir), None, "source").audit
    assert estimated.estimate is not None
    assert estimated.trust is not None
    assert estimated.rate == pytest.approx(len(WRONG) / 120, abs=0.08)
    assert (1 - estimated.trust.right).mean() == pytest.approx(estimated.rate, abs=1e-6)
    assert estimated.trust.rates == {"web": estimated.rate}
    assert audit_labels(make_rows(), str(tiny_model_dir), 0.3, None).audit.rate == 0.3


def test_a_file_may_be_parquet(file: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    table = pyarrow.Table.from_pylist([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    for name in ("pairs.jsonl", "pairs.parquet"):
        options = ("--embedder", tiny_model_dir, "--noise-rate", 0.17, "--folder", tmp_path / name[6:])
        assert run(tmp_path / name, *options).exit_code == 0
    for name in ("audit.parquet", "audit.html"):
        assert (tmp_path / "jsonl" / name).read_bytes() == (tmp_path / "parquet" / name).read_bytes()


def make_audit(right: list[float], texts: dict[str, list[str]] | None = None, **changes: Any) -> LabelAudit:
    count = len(right)
    rows = make_rows(count)
    values: dict[str, Any] = {
        "ids": [row["id"] for row in rows],
        "texts": texts or {name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")},
        "figures": {},
        "groups": None,
        "trust": Trust(np.array(right), {"x": 0.4, "y": 0.1}, np.array(right), np.zeros(count)),
        "contradictions": Contradictions(np.zeros(count, dtype=int), [[] for _ in right]),
        "rate": 0.2,
        "estimate": None,
        "left_out": 0,
    }
    return LabelAudit(**{**values, **changes})


def test_the_page_escapes_what_people_wrote_and_loads_nothing(tmp_path: Path) -> None:
    texts = {"prompt": ["<script>p</script>", "p"], "chosen": ["a & b", "z" * (CUT + 50)], "rejected": ["c", "d"]}
    near = Contradictions(np.array([1, 0]), [[1], []])
    write_audit(tmp_path, make_audit([0.05, 0.9], texts, groups=["x", "y"], contradictions=near, left_out=3))
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "<script>p" not in page
    assert "&lt;script&gt;p" in page
    assert "a &amp; b" in page
    assert "3 left out" in page
    assert "than the rest: x 0.40.</p>" in page
    assert page.count("z" * CUT + " …") == 1
    assert page.index("a &amp; b") < page.index("z" * CUT + " …") < page.index("z" * (CUT + 50))
    assert not re.search(r"https?://|src=|@import|url\(|<link", page)


def test_what_nobody_knows_has_no_column_and_the_order_is_by_margin(tmp_path: Path) -> None:
    figures = {"loss": np.array([0.1, np.nan, 3.0]), "margin": np.array([2.0, np.nan, -3.0])}
    audit = make_audit([0.5] * 3, figures=figures, trust=None, contradictions=None)
    write_audit(tmp_path, audit)
    found = read_table(tmp_path)
    assert [row["margin"] for row in found] == [-3.0, 2.0, None]
    assert list(found[0]) == ["id", "loss", "margin", "prompt", "chosen", "rejected"]
    assert audit.suggested() == {}
    assert sample_suspects(audit, 1)[0]["id"] == audit.ids[2]


def test_the_share_of_each_suggestion() -> None:
    shares = make_audit([0.9, 0.6, 0.3, 0.01]).suggested()
    assert shares == {"audit_suggested_keep": 0.5, "audit_suggested_drop": 0.25, "audit_suggested_relabel": 0.25}


@pytest.mark.parametrize(("right", "action"), [(0.5, "keep"), (0.49, "drop"), (0.11, "drop"), (0.09, "relabel")])
def test_actions(tmp_path: Path, right: float, action: str) -> None:
    audit = make_audit([right])
    assert audit.actions == [action]
    cleaned, removed = apply_audit(tmp_path, AuditedRows(make_rows(1), audit))
    assert (len(read_rows(cleaned)), len(read_rows(removed))) == ((0, 1) if action == "drop" else (1, 0))


def test_neighbours_are_compared_in_the_nearer_orientation() -> None:
    """Twelve pairs near one point, of which the last is turned around, and three far away that agree with nobody."""
    generator = np.random.default_rng(0)
    near = np.array([1.0, 1.0, 0.0]) + 0.01 * generator.normal(size=(12, 3))
    near[11] *= -1
    found = find_contradictions(np.vstack([near, [[0, 0, 9.0], [0, 0, 9.1], [0, 0, -9.0]]]), 0)
    assert found.counts[11] == 10
    assert len(found.nearest[11]) == 3
    assert all(count <= 1 for count in found.counts[:11])
    assert all(places in ([], [11]) for places in found.nearest[:11])
    assert found.nearest[14][:2] == [12, 13]


def test_few_pairs_have_few_neighbours() -> None:
    assert find_contradictions(np.ones((1, 2)), 0).nearest == [[]]
    assert find_contradictions(np.array([[1.0], [-1.0]]), 0).nearest == [[1], [0]]


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
    assert (len(found.rows), found.audit.left_out) == (10, 4)
    alone = audit_labels(rows, str(tiny_model_dir), 0.2, None)
    assert found.audit.columns()["wrong"] == pytest.approx(alone.audit.columns()["wrong"])


def test_a_long_text_loses_its_beginning(tiny_model_dir: Path) -> None:
    texts = ["x" * 3000 + " end", "y" * 3000 + " end", "x" * 3000 + " the other"]
    first, second, third = label_audit.embed_texts(texts, str(tiny_model_dir))
    assert not np.allclose(first, third, atol=1e-4)
    assert first.shape == second.shape


def test_looks_are_judged_beside_the_embeddings(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better answers end with an exclamation mark, which an embedder that says nothing cannot tell."""
    monkeypatch.setattr(
        label_audit, "embed_texts", lambda texts, _: np.random.default_rng(0).normal(size=(len(texts), 4))
    )
    rows = [{**row, "chosen": row["chosen"][:20] + "!", "rejected": row["rejected"][:20] + "."} for row in make_rows()]
    for number in WRONG:
        rows[number]["chosen"], rows[number]["rejected"] = rows[number]["rejected"], rows[number]["chosen"]
    found = audit_labels(rows, str(tiny_model_dir), 0.2, None)
    suspects = found.audit.order()[: len(WRONG)]
    assert len(set(suspects.tolist()) & set(WRONG)) > len(WRONG) / 2


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
