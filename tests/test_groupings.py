"""Columns by which labels are wrong together: found, ordered, told to people, and when nothing is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import alignflow
from rlhf import groupings
from rlhf.data.formats import Row
from rlhf.groupings import find_groupings, group_columns

PAIRS, TOPICS = 400, 10
TOPIC = np.arange(PAIRS) // (PAIRS // TOPICS)
NOTHING_SEEN = np.zeros((PAIRS, 0))


def judge(wrong: np.ndarray, *, noise_rate: float = 0.1) -> list[groupings.Grouping]:
    """Of pairs whose better answer has the larger first coordinate, in topics, fields of two, by two annotators."""
    generator = np.random.default_rng(0)
    differences = generator.normal(size=(PAIRS, 8))
    differences[:, 0] = np.abs(differences[:, 0])
    differences *= np.where(wrong, -1.0, 1.0)[:, None]
    rows: list[Row] = [
        {"topic": f"topic {topic}", "field": int(topic) // 2, "annotator": "ab"[number % 2]}
        for number, topic in enumerate(TOPIC)
    ]
    return find_groupings(rows, differences, NOTHING_SEEN, noise_rate, 0)


def test_the_column_that_explains_most_comes_first() -> None:
    """Topics 2 and 3 are a field: of the one three labels of ten are wrong, of the other all."""
    found = judge((TOPIC == 3) | ((TOPIC == 2) & (np.arange(PAIRS) % 10 < 3)))
    assert [grouping.column for grouping in found] == ["topic", "field"]
    assert [[name for name, _ in grouping.wrong] for grouping in found] == [["topic 3"], ["1"]]
    assert found[0].wrong[0][1] > 0.8
    assert str(found[0]).startswith(
        "topic: of 1 of its 10 values most labels contradict all other labels ('topic 3' 0."
    )
    assert str(found[0]).endswith("judge by it: --group topic")


@pytest.mark.parametrize("noise_rate", [0.1, 0.4])
def test_errors_that_follow_no_column_name_none(noise_rate: float) -> None:
    assert judge(np.random.default_rng(2).random(PAIRS) < noise_rate, noise_rate=noise_rate) == []


@pytest.mark.parametrize(("evidence", "count"), [(32.0, 1), (34.0, 0)])
def test_evidence_has_to_make_up_for_the_number_of_groups(
    evidence: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topic of which two thirds are wrong explains its labels 35.2 nats better; ten topics cost log 10 = 2.3."""
    monkeypatch.setattr("rlhf.trust.EVIDENCE", evidence)
    assert len(judge((TOPIC == 3) & (np.arange(PAIRS) % 3 > 0))) == count


def test_a_group_is_a_name_or_number_that_recurs_and_that_all_rows_have() -> None:
    rows = [
        {
            "id": str(number % 4),
            "prompt": [{"role": "user", "content": f"q {number % 5}"}],
            "chosen": "a",
            "rejected": "b",
            "source": f"s {number % 3}",
            "batch": number % 4,
            "margin": number % 3,
            "truth_topic": f"t {number % 3}",
            "annotator": "ab"[number % 2],
            "score": number % 3 / 2,
            "time": str(number),
            "seldom": None if number == 7 else "x",
        }
        for number in range(120)
    ]
    assert list(group_columns(rows)) == ["source", "batch", "prompt"]


def test_at_most_so_many_columns_are_tried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(groupings, "MOST_COLUMNS", 1)
    caplog.set_level("INFO")
    assert [grouping.column for grouping in judge(TOPIC // 2 == 3)] == ["field"]
    assert "not tried: topic" in caplog.text


def test_the_audit_says_it_unless_a_group_is_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    generator = np.random.default_rng(0)
    lines = []
    for number in range(200):
        sides = ["".join(generator.choice(list(letters), 30)) for letters in ("eeeeeab", "xxxxxab")]
        better, worse = sides[::-1] if number % 5 == 2 else sides
        row = {"prompt": f"q {number}", "chosen": better, "rejected": worse, "source": f"<i>{number % 5}</i>"}
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    told, named = (_audit(file, tmp_path, tiny_model_dir, options) for options in ([], ["--group", "source"]))
    sentence = "source: of 1 of its 5 values most labels contradict all other labels"
    assert f"labels are wrong together by {sentence} ('<i>2</i>' " in told[0]
    assert f"<b>Labels are wrong together</b> by {sentence} (&#39;&lt;i&gt;2&lt;/i&gt;&#39; " in told[1]
    assert not any("wrong together" in text for text in named)


def _audit(file: Path, tmp_path: Path, model: Path, options: list[str]) -> tuple[str, str]:
    folder = tmp_path / "audit"
    words: list[Any] = ["audit", file, "--embedder", model, "--noise-rate", 0.2, "--folder", folder, *options]
    result = CliRunner().invoke(alignflow.app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.output, (folder / "audit.html").read_text(encoding="utf-8")
