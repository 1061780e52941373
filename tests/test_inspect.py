"""`alignflow data inspect`: the shape that is guessed, params that can be pasted, honest counts, and one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import alignflow
from rlhf.data.formats import Row
from rlhf.data.inspect import Inspection, inspect_file
from rlhf.data.sources import load_source
from rlhf.errors import UserError
from rlhf.params import FileSource

HH = [
    {
        "chosen": f"\n\nHuman: {letter}\n\nAssistant: {'yes' * number}",
        "rejected": f"\n\nHuman: {letter}\n\nAssistant: no",
    }
    for number, letter in enumerate("abcdefgh", start=1)
]


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def look(path: Path, shape: str | None = None, kind: str | None = None) -> Inspection:
    return inspect_file(path, shape, kind, None)


def test_a_known_shape_with_counts_lengths_and_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "hh.jsonl", [*HH, {"chosen": "nobody speaks", "rejected": None}])
    found = inspect_file(path, None, None, lambda text: len(text) // 3)
    assert (found.guess.shape, found.guess.kind) == ("hh_preferences", "preferences")
    assert [other.shape for other in found.others] == ["hh_sft", "hh_prompts"]
    assert found.counts == {"rows read": 9, "rows made": 9, "rows lacking something": 1, "prompts": 9}
    by_column = {(row["column"], row["unit"]): row for row in found.lengths}
    chosen = by_column["chosen", "characters"]
    assert (chosen["least"], chosen["median"], chosen["90 %"], chosen["most"]) == ("3", "12", "24", "24")
    assert by_column["chosen", "tokens"]["most"] == "8"
    assert [row["prompt"] for row in found.rows] == [f"[user] {letter}" for letter in "abcde"]
    assert found.columns[1] == {
        "column": "rejected",
        "holds": "text",
        "missing": "1",
        "first value": "Human: a Assistant: no",
    }


@pytest.mark.parametrize(
    ("rows", "kind"),
    [(HH, "preferences"), ([{"question": "q", "reply": "a"}], "sft"), ([{"prompt": "p", "stars": 3}], "prompts")],
)
def test_the_snippet_reads_the_file(tmp_path: Path, rows: list[Row], kind: str) -> None:
    path = write(tmp_path / "it's: a file.jsonl", rows)
    found = look(path)
    ((snippet_kind, values),) = YAML(typ="safe", pure=True).load(found.snippet)["prepare"]["data"].items()
    assert snippet_kind == found.guess.kind == kind
    assert len(list(load_source(FileSource(**values), snippet_kind, Path()))) == len(rows)


def test_shape_and_kind_may_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "hh.jsonl", HH)
    assert look(path, shape="hh_sft").guess.kind == "sft"
    assert look(path, kind="prompts").guess.shape == "hh_prompts"
    plain = write(tmp_path / "plain.jsonl", [{"prompt": "p", "completion": "c", "score": 1}])
    assert look(plain).guess.kind == "ratings"
    assert look(plain, shape="canonical", kind="sft").guess.kind == "sft"


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ("hh_preference", None, "there is no shape 'hh_preference'; did you mean hh_preferences?"),
        (None, "rating", "there is no kind 'rating'; did you mean ratings?"),
        ("hh_sft", "prompts", "shape hh_sft gives sft, not prompts; leave out --kind"),
        ("canonical", None, "does not say which; name it with --kind"),
        (
            None,
            "ratings",
            r"looks like hh_preferences \(preferences\), .*, not like ratings \(columns chosen, rejected\)",
        ),
        ("alpaca_sft", None, r"has not the shape alpaca_sft: no column 'instruction', .* it looks like hh_sft \(sft\)"),
    ],
)
def test_wrong_wishes(tmp_path: Path, shape: str | None, kind: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        look(write(tmp_path / "hh.jsonl", HH), shape, kind)


def test_a_file_of_no_known_shape(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"odd.jsonl has no shape that is known \(columns a, b\)"):
        look(write(tmp_path / "odd.jsonl", [{"a": 1, "b": 2}]))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["alignflow", "data", "inspect", *arguments])
    with pytest.raises(SystemExit) as caught:
        alignflow.main()
    return int(caught.value.code or 0)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "hh.jsonl", [{**HH[0], "note": "[bold]not markup[/bold]"}, *HH[1:]])
    assert run(monkeypatch, str(path)) == 0
    shown = capsys.readouterr().out
    assert "read as hh_preferences (preferences): 8 rows read, 8 rows made, 0 rows lacking something" in shown
    assert "      shape: hh_preferences\n" in shown
    assert "[bold]not markup[/bold]" in shown


@pytest.mark.parametrize("arguments", [("none.jsonl",), ("hh.jsonl", "--kind", "odd")])
def test_wrong_input_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    write(tmp_path / "hh.jsonl", HH)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "Traceback" not in told
