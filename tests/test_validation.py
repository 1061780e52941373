"""The stage `validate`: which rows it sets aside and why, what stops it, and that nothing is lost."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from rlhf.data.formats import Row, read_rows, with_ids, write_rows
from rlhf.errors import UserError
from tasks.paths import Paths
from tests.validation import add, check, put, reasons, sift, sound, turns


def test_sound_rows_pass_unchanged(workspace: Paths) -> None:
    metrics = check(workspace)
    for kind in ("sft", "preferences", "prompts"):
        assert reasons(workspace, kind) == []
        assert metrics[kind]["rows_read"] == metrics[kind]["rows_kept"] == 16
        assert metrics[kind]["expectations_kept"]["failed"] == []
        for split in ("train", "test"):
            prepared = workspace.prepared / kind / f"{split}.jsonl"
            assert workspace.rows(kind, split).read_bytes() == prepared.read_bytes()
    assert metrics["success"] is True
    assert (workspace.report("validate") / "index.html").exists()


BROKEN: list[tuple[str, Row, str]] = [
    ("sft", {"prompt": None, "completion": "w1"}, "prompt_missing"),
    ("sft", {"completion": "w1"}, "prompt_missing"),
    ("sft", {"prompt": 7, "completion": "w1"}, "prompt_not_text"),
    ("sft", {"prompt": ["w1"], "completion": "w1"}, "prompt_not_text"),
    ("sft", {"prompt": " \n", "completion": "w1"}, "prompt_empty"),
    ("sft", {"prompt": "w1 " * 9, "completion": "w1"}, "prompt_too_long"),
    ("sft", {"prompt": "w1", "completion": None}, "completion_missing"),
    ("sft", {"prompt": "w1", "completion": float("nan")}, "completion_missing"),
    ("sft", {"prompt": "w1", "completion": True}, "completion_not_text"),
    ("sft", {"prompt": "w1", "completion": ""}, "completion_empty"),
    ("sft", {"prompt": "w1", "completion": "w1 " * 9}, "completion_too_long"),
    ("sft", {"prompt": "w1 " * 6, "completion": "w1 " * 6}, "longer_than_context"),
    ("sft", {"prompt": "w1", "completion": [{"role": "assistant", "content": "w1"}]}, "mixed_forms"),
    (
        "sft",
        {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w1"}]},
        "mixed_forms",
    ),
    ("sft", {"prompt": "w20 w5", "completion": "w9"}, "leak"),
    ("preferences", {"prompt": "w1", "chosen": "w1", "rejected": None}, "rejected_missing"),
    ("preferences", {"prompt": "w1", "chosen": 1, "rejected": "w1"}, "chosen_not_text"),
    ("preferences", {"prompt": "w1", "chosen": "w1", "rejected": "w1 "}, "chosen_equals_rejected"),
    ("preferences", {"prompt": "w1", "chosen": "w1", "rejected": "w1 " * 9}, "rejected_too_long"),
    ("preferences", {"prompt": "w20 w5", "chosen": "w1", "rejected": "w2"}, "leak"),
    ("preferences", sound("preferences", 3), "duplicate"),
    ("prompts", {"prompt": "w1 " * 9}, "prompt_too_long"),
    ("prompts", {"prompt": {"text": "w1"}}, "prompt_not_text"),
    ("prompts", {"prompt": "w3 w5", "answer": "7"}, "duplicate"),
]


def test_broken_rows_are_set_aside_with_reason_and_id(workspace: Paths) -> None:
    for kind, row, _ in BROKEN:
        add(workspace, kind, row)
    metrics = check(workspace)
    for kind in ("sft", "preferences", "prompts"):
        expected = [(with_ids([row])[0]["id"], reason) for of, row, reason in BROKEN if of == kind]
        found = read_rows(workspace.quarantine / f"{kind}.jsonl")
        assert [(row["id"], row["reason"]) for row in found] == expected
        assert {row["split"] for row in found} == {"train"}
        assert metrics[kind]["quarantined"] == Counter(reason for _, reason in expected)
        assert metrics[kind]["rows_read"] == metrics[kind]["rows_kept"] + metrics[kind]["rows_quarantined"]
        kept = [row for split in ("train", "test") for row in read_rows(workspace.rows(kind, split))]
        assert len(kept) == metrics[kind]["rows_kept"] == 16
        assert metrics[kind]["expectations_kept"]["failed"] == []
        assert metrics[kind]["expectations_as_read"]["failed"]


def test_the_same_rows_give_the_same_pages(workspace: Paths) -> None:
    """Nothing in them tells when or how often they were made, nor tells a server who reads them."""
    pages: list[dict[str, str]] = []
    for _ in range(2):
        check(workspace)
        report = workspace.report("validate")
        pages.append({str(page.relative_to(report)): page.read_text("utf-8") for page in report.rglob("*.html")})
    assert pages[0] == pages[1]
    assert len(pages[0]) >= 4
    assert not any("dataContextId" in page for page in pages[0].values())


def test_quarantined_rows_keep_all_their_columns(workspace: Paths) -> None:
    add(
        workspace, "sft", {"prompt": None, "completion": "w1", "reason": "own", "truth_good": False, "extra": [1, None]}
    )
    (row,) = sift(workspace, "sft").quarantined
    assert row["reason"] == "prompt_missing"
    assert row["source_reason"] == "own"
    assert (row["truth_good"], row["extra"], row["completion"]) == (False, [1, None], "w1")


def test_a_margin_must_be_a_number(workspace: Paths) -> None:
    rows = [sound("preferences", number) | {"margin": 1.5} for number in range(4)]
    put(workspace, "preferences", [*rows, {**rows[0], "prompt": "w9", "margin": "1.5"}], [{**rows[0], "prompt": "w30"}])
    assert [row["reason"] for row in sift(workspace, "preferences").quarantined] == ["not_a_number"]


def test_a_rating_must_be_a_number_on_its_scale(workspace: Paths) -> None:
    def rated(number: int, **changes: Any) -> Row:
        return {"prompt": f"w{number}", "completion": "w1", "score": 2} | changes

    broken = [
        (rated(10, score=None), "not_a_number"),
        (rated(11, score="2"), "not_a_number"),
        (rated(12, score=True), "not_a_number"),
        (rated(13, score=float("inf")), "not_a_number"),
        (rated(14, score=4.5), "score_off_scale"),
        (rated(15, score=-1), "score_off_scale"),
        (rated(0), "duplicate"),
        (rated(16, completion=None), "completion_missing"),
    ]
    intact = [rated(number) for number in range(4)] + [
        rated(0, score=3),
        rated(1, annotator="b"),
        rated(5, score=0),
    ]
    put(workspace, "ratings", [*intact, *(row for row, _ in broken)], [rated(20, score=4.0)])
    outcome = sift(workspace, "ratings", scale=(0, 4))
    assert [row["reason"] for row in outcome.quarantined] == [reason for _, reason in broken]
    assert all(row["id"] for row in outcome.quarantined)
    assert outcome.metrics["mean_score"] == pytest.approx((2 * 5 + 3 + 0 + 4) / 8)
    assert outcome.metrics["median_score"] == 2
    assert len(sift(workspace, "ratings").quarantined) == len(broken) - 2  # no scale is declared


def test_conversations_need_known_roles_in_order(workspace: Paths) -> None:
    answer = turns("w1", role="assistant")
    broken: list[tuple[Row, str]] = [
        ({"prompt": [], "completion": answer}, "prompt_empty"),
        ({"prompt": turns("w1", None), "completion": answer}, "prompt_turns"),
        ({"prompt": turns("w1", role="narrator"), "completion": answer}, "prompt_turns"),
        ({"prompt": turns("w1") + answer, "completion": answer}, "prompt_turns"),
        ({"prompt": turns("w1") + turns("w2", role="system") + turns("w3"), "completion": answer}, "prompt_turns"),
        ({"prompt": turns("w1") + turns("w2", role="tool"), "completion": answer}, "prompt_turns"),
        ({"prompt": turns("w1"), "completion": turns("w1")}, "completion_turns"),
        ({"prompt": turns("w1 " * 9), "completion": answer}, "prompt_too_long"),
        ({"prompt": "w1", "completion": "w2"}, "mixed_forms"),
    ]
    intact = [
        {"prompt": turns("w0", role="system") + turns(f"w{number}"), "completion": answer} for number in range(20)
    ]
    put(workspace, "sft", [*intact[:16], *(row for row, _ in broken)], intact[16:])
    assert [row["reason"] for row in sift(workspace, "sft").quarantined] == [reason for _, reason in broken]


def test_conversations_need_a_chat_template(workspace: Paths) -> None:
    (workspace.model("base") / "chat_template.jinja").unlink()
    put(workspace, "prompts", [{"prompt": turns("w1")}], [{"prompt": turns("w2")}])
    with pytest.raises(UserError, match=r"no chat template; set prepare.chat_template to plain"):
        sift(workspace, "prompts")


def test_two_annotators_may_agree_and_one_may_not_repeat_himself(workspace: Paths) -> None:
    verdict = sound("preferences", 30) | {"annotator": "ann"}
    add(workspace, "preferences", verdict, verdict | {"annotator": "bob"}, verdict | {"source_id": 9})
    outcome = sift(workspace, "preferences")
    assert [(row["reason"], row["source_id"]) for row in outcome.quarantined] == [("duplicate", 9)]
    assert outcome.metrics["duplicate_share"] == pytest.approx(1 / 19)


def test_one_id_for_two_contents(workspace: Paths) -> None:
    path = workspace.prepared / "sft" / "train.jsonl"
    write_rows(path, [*read_rows(path), {**sound("sft", 30), "id": "same"}, {**sound("sft", 31), "id": "same"}])
    assert [(row["reason"], row["id"]) for row in sift(workspace, "sft").quarantined] == [("repeated_id", "same")]


def test_too_many_duplicates_stop(workspace: Paths) -> None:
    add(workspace, "preferences", *[sound("preferences", 3)] * 4)
    assert sift(workspace, "preferences", max_quarantined_share=0.0, max_duplicate_share=0.2).problems == []
    (problem,) = sift(workspace, "preferences", max_duplicate_share=0.19).problems
    assert "4 of 20 rows repeat another, above validate.max_duplicate_share 0.19 (duplicate 4, such as " in problem


def test_contradictions_stay_up_to_the_limit(workspace: Paths) -> None:
    turned = [sound("preferences", n) | {"chosen": "w2 w3", "rejected": "w1"} for n in range(4)]
    add(workspace, "preferences", *turned)
    outcome = sift(workspace, "preferences", max_contradiction_share=0.4)
    assert (outcome.quarantined, outcome.problems) == ([], [])
    assert outcome.metrics["contradiction_share"] == pytest.approx(8 / 20)
    (problem,) = sift(workspace, "preferences", max_contradiction_share=0.39).problems
    assert "40.0% of the rows kept are contradicted" in problem
    assert "max_contradiction_share 0.39" in problem


def test_length_bias_only_warns(workspace: Paths) -> None:
    longer = [{"prompt": f"w{n}", "chosen": "w1 w2", "rejected": "w1"} for n in range(4)]
    add(workspace, "preferences", *longer, {"prompt": "w9", "chosen": "w1", "rejected": "w3"})
    outcome = sift(workspace, "preferences", max_length_bias=0.2)
    assert (outcome.metrics["length_bias"], outcome.metrics["warnings"]) == (pytest.approx(4 / 20), [])
    outcome = sift(workspace, "preferences", max_length_bias=0.1)
    assert (outcome.metrics["warnings"], outcome.problems) == (["length_bias"], [])


def test_pairs_of_equal_length_have_no_length_bias(workspace: Paths) -> None:
    pair = {"chosen": "w1", "rejected": "w2"}
    put(workspace, "preferences", [pair | {"prompt": "w1"}], [pair | {"prompt": "w2"}])
    outcome = sift(workspace, "preferences")
    assert (outcome.metrics["length_bias"], outcome.problems) == (None, [])


def test_one_answer_to_every_prompt_warns(workspace: Paths) -> None:
    put(workspace, "prompts", [{"prompt": f"w{n}", "answer": "7"} for n in range(3)], [{"prompt": "w9", "answer": "7"}])
    metrics = sift(workspace, "prompts").metrics
    assert (metrics["warnings"], metrics["commonest_answer_share"]) == (["single_answer"], 1)


def test_evaluation_prompts_in_training_warn(workspace: Paths) -> None:
    assert check(workspace)["warnings"] == []
    put(workspace, "sft", [sound("sft", number) for number in range(12)] + [sound("sft", 21)], [sound("sft", 30)])
    assert check(workspace)["warnings"] == ["sft: 1 of 4 evaluation prompts also stand in its training rows"]


def test_too_many_broken_rows_stop_and_nothing_is_lost(workspace: Paths) -> None:
    broken: list[Row] = [{"prompt": None, "completion": f"w{number}"} for number in range(4)]
    add(workspace, "sft", *broken)
    with pytest.raises(UserError) as caught:
        check(workspace, max_quarantined_share=0.1)
    first = with_ids(broken)[0]["id"]
    assert str(caught.value).startswith(
        "sft: 4 of 20 rows (20.0%) are broken, above validate.max_quarantined_share 0.1 "
        f"(prompt_missing 4, such as {first} "
    )
    assert "data/quarantine/sft.jsonl" in str(caught.value)
    assert reasons(workspace, "sft") == ["prompt_missing"] * 4
    assert (workspace.report("validate") / "index.html").exists()
    assert json.loads(workspace.metrics("validate").read_text(encoding="utf-8"))["success"] is False
    assert not workspace.validated.exists()


def test_all_rows_quarantined(workspace: Paths) -> None:
    put(workspace, "preferences", [{"prompt": "w1", "chosen": "w1", "rejected": "w1"}] * 3, [{"prompt": None}])
    outcome = sift(workspace, "preferences")
    assert outcome.problems[0].startswith("preferences: all 4 rows are quarantined (chosen_equals_rejected 3, such as ")
    assert len(outcome.quarantined) == 4


def test_too_few_rows(workspace: Paths) -> None:
    put(workspace, "prompts", [sound("prompts", 1)], [sound("prompts", 2)])
    (problem,) = sift(workspace, "prompts", min_rows=3).problems
    assert problem.startswith("prompts: 2 rows are left of 2, fewer than validate.min_rows 3")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_side_without_rows(workspace: Paths, split: str) -> None:
    (workspace.prepared / "sft" / f"{split}.jsonl").write_text("", encoding="utf-8")
    (problem,) = sift(workspace, "sft").problems
    assert problem.startswith(f"sft: no row is left for {split} (none was prepared)")


def test_no_rows_at_all(workspace: Paths) -> None:
    put(workspace, "sft", [], [])
    assert sift(workspace, "sft").problems == [
        "sft: data/prepared/sft has no rows; give prepare.data.sft a source with rows"
    ]


def test_a_kind_that_nothing_needs_is_left_empty(workspace: Paths) -> None:
    put(workspace, "preferences", [], [])
    metrics = check(workspace, preferences=False)
    assert "preferences" not in metrics
    assert workspace.rows("preferences", "train").read_text(encoding="utf-8") == ""
    assert workspace.rows("preferences", "test").read_text(encoding="utf-8") == ""


def test_a_malformed_line_is_named(workspace: Paths) -> None:
    path = workspace.prepared / "sft" / "train.jsonl"
    path.write_text('{"prompt": "w1", "completion": "w2"}\n{"prompt":\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"data/prepared/sft/train.jsonl, line 2: not valid JSON"):
        check(workspace)


def test_a_missing_file_is_named(workspace: Paths) -> None:
    (workspace.prepared / "prompts" / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"data/prepared/prompts/test.jsonl does not exist"):
        check(workspace)


def test_two_runs_write_the_same_bytes(workspace: Paths) -> None:
    for kind, row, _ in BROKEN:
        add(workspace, kind, row)

    def written() -> dict[str, bytes]:
        check(workspace)
        folders = (workspace.validated, workspace.quarantine, workspace.root / "metrics")
        return {str(path): path.read_bytes() for folder in folders for path in sorted(folder.rglob("*.json*"))}

    first = written()
    assert len(first) == 8 + 4 + 1
    assert written() == first
