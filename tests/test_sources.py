"""Data sources: every format gives the same rows, and every bad file ends in a sentence with its place."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data import sources
from rlhf.data.formats import Row, read_rows, row_id, with_ids, write_rows
from rlhf.data.sources import Treatment
from rlhf.data.splits import prepare_source, split_by_prompt
from rlhf.errors import UserError
from rlhf.params import FileSource, HubSource

ROWS: list[Row] = [
    {"prompt": "one, «two»", "completion": 'a "quoted"\nline', "extra": "x"},
    {"prompt": "数学", "completion": "\u2028odd break", "extra": "y"},
    {"prompt": "third", "completion": "ok", "extra": ""},
]


def source(path: str, **changes: Any) -> FileSource:
    values = {"kind": "file", "path": path, "shape": "canonical", "columns": {}, "test_share": 0.2, "limit": None}
    return FileSource(**values | changes)


def load_source(*arguments: Any) -> list[Row]:
    return list(sources.load_source(*arguments))


def as_json_lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[Row]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def as_parquet(rows: list[Row]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[list[Row]], bytes]] = {
    "rows.jsonl": as_json_lines,
    "rows.jsonl.gz": lambda rows: gzip.compress(as_json_lines(rows)),
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "rows.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "rows.csv": as_csv,
    "rows.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "rows.parquet": as_parquet,
    "with.dots.in.NAME.JSONL": lambda rows: b"\xef\xbb\xbf" + as_json_lines(rows),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](ROWS))
    assert load_source(source(name), "sft", tmp_path) == with_ids(ROWS)


def test_folder_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "set")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "dev": dataset}).save_to_disk(tmp_path / "two")
    for name in ("set", "one", "two/dev"):
        assert load_source(source(name), "sft", tmp_path) == with_ids(ROWS)
    with pytest.raises(UserError, match=r"two holds the splits train, dev; name one of them, such as two/train"):
        load_source(source("two"), "sft", tmp_path)


def test_conversations_survive_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yes"}]}]
    (tmp_path / "chat.parquet").write_bytes(as_parquet(rows))
    assert load_source(source("chat.parquet"), "sft", tmp_path) == with_ids(rows)


def test_dates_and_decimals_become_json(tmp_path: Path) -> None:
    row = {"prompt": "p", "day": datetime.date(2026, 1, 2), "price": decimal.Decimal("1.50"), "tags": ["a"]}
    (tmp_path / "a.parquet").write_bytes(as_parquet([row]))
    assert load_source(source("a.parquet"), "prompts", tmp_path)[0] | {"id": ""} == {
        "id": "",
        "prompt": "p",
        "day": "2026-01-02",
        "price": 1.5,
        "tags": ["a"],
    }
    (tmp_path / "b.parquet").write_bytes(as_parquet([{"prompt": "p", "image": b"\x00"}]))
    with pytest.raises(UserError, match=r"b.parquet: column image holds bytes, which JSON cannot; drop that column"):
        load_source(source("b.parquet"), "prompts", tmp_path)


def test_csv_numbers_and_truths(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,margin,weight,truth_ok,answer\np,1.5,many,True,7\n", encoding="utf-8")
    (row,) = load_source(source("a.csv"), "prompts", tmp_path)
    assert (row["margin"], row["weight"], row["truth_ok"], row["answer"]) == (1.5, "many", True, "7")


def put(path: Path, text: str | bytes) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


GOOD = '{"prompt": "p", "completion": "c"}\n'
BAD_FILES: list[tuple[str, str | bytes | None, str]] = [
    ("none.jsonl", None, "none.jsonl does not exist"),
    ("a.jsonl", "", "a.jsonl is empty"),
    ("a.jsonl", "\n \n", "a.jsonl is empty"),
    ("a.json", "", "a.json is empty"),
    ("a.json", "[]", "a.json is empty"),
    ("a.csv", "", "a.csv is empty"),
    ("a.csv", "prompt,completion\n", "a.csv is empty"),
    ("a.jsonl", GOOD + "\n" + '{"prompt": "p", \n', "a.jsonl, line 3: not valid JSON"),
    ("a.jsonl", GOOD * 4 + "[1]\n", "a.jsonl, line 5: holds a list, not an object"),
    ("a.jsonl", GOOD + '"text"', "a.jsonl, line 2: holds a text, not an object"),
    ("a.jsonl", GOOD + "[" * 100_000, "a.jsonl, line 2: not"),
    ("a.jsonl", GOOD + '{"prompt": ' + "9" * 5000 + "}", "a.jsonl, line 2: not readable as JSON"),
    ("a.jsonl", GOOD + '{"prompt": "\\ud83d"}', r"a.jsonl, line 2: not UTF-8, \\ud83d is half of a surrogate pair"),
    ("a.jsonl", GOOD.encode() * 2 + b'{"prompt": "caf\xe9"}', r"a.jsonl, line 3: byte 85 \(0xe9\) is not UTF-8"),
    ("a.jsonl", GOOD.encode("utf-16"), "a.jsonl is UTF-16, not UTF-8"),
    ("a.jsonl.gz", GOOD, "a.jsonl.gz is no complete gzip file"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:-9], "a.jsonl.gz is no complete gzip file"),
    ("a.json", '[\n{"prompt": "p"},\n{"prompt" 1}]', "a.json, line 3: not valid JSON"),
    ("a.json", GOOD * 2, "a.json, line 2: not valid JSON .*name the file .jsonl if it holds one object per line"),
    ("a.json", '{"data": []}', "a.json holds an object, not a list of objects"),
    ("a.json", "[{}, null]", "a.json, row 2: holds null, not an object"),
    ("a.csv", "prompt,completion\np,c\np,c,d\n", "a.csv, line 3: 3 cells under 2 columns"),
    ("a.csv", 'prompt,completion\n"p\np",c\np\n', "a.csv, line 4: 1 cells under 2 columns"),
    ("a.csv", 'prompt,completion\np,"c\n', "a.csv, line 2: not valid CSV"),
    ("a.csv", "prompt,prompt\np,c\n", "a.csv, line 1: the column name 'prompt' is empty or stands twice"),
    ("a.parquet", b"PAR1 no", "a.parquet is no readable Parquet file"),
    ("a.txt", "x", "a.txt has the unknown extension '.txt'; use .jsonl"),
    ("a.parquet.gz", "x", "a.parquet.gz has the unknown extension '.parquet.gz'"),
    ("rows", "x", "rows has the unknown extension ''"),
    (
        "a.jsonl",
        '{"prompt": "p", "answer": "c"}',
        r"a.jsonl has no column 'completion', .*found: prompt, answer.*sft.columns",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_file(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        put(tmp_path / name, content)
    with pytest.raises(UserError, match=f"^{message}") as caught:
        load_source(source(name), "sft", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"data is a folder that `datasets` did not save"):
        load_source(source("data"), "sft", tmp_path)
    put(tmp_path / "data" / "state.json", "{}")
    with pytest.raises(UserError, match=r"data is a damaged `datasets` folder"):
        load_source(source("data"), "sft", tmp_path)


def test_a_folder_with_letters_that_are_no_text(tmp_path: Path) -> None:
    import datasets
    import pyarrow

    letters = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"w1\xff"]).buffers())
    datasets.Dataset(pyarrow.table({"prompt": letters, "completion": ["w2"]})).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match=r"data holds text that is no UTF-8 \(.*\); save it again$"):
        load_source(source("data"), "sft", tmp_path)


def test_nulls_and_other_types_pass(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"prompt": None, "completion": 5},
        {"completion": [None]},
        {"prompt": {"a": 1}, "completion": float("inf")},
    ]
    put(tmp_path / "a.jsonl", as_json_lines(rows))
    loaded = load_source(source("a.jsonl"), "sft", tmp_path)
    assert loaded == with_ids(rows)


def test_columns_are_renamed(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", as_json_lines([{"question": "q", "answer": "a", "prompt": "hidden", "id": 4}]))
    (row,) = load_source(source("a.jsonl", columns={"prompt": "question", "completion": "answer"}), "sft", tmp_path)
    content = {"prompt": "q", "completion": "a", "source_prompt": "hidden", "source_id": 4}
    assert row == {"id": row_id(content), **content}


def test_a_mapped_column_that_is_missing(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", as_json_lines([{"question": "q", "reply": "a"}]))
    with pytest.raises(UserError) as caught:
        load_source(source("a.jsonl", columns={"prompt": "questoin"}), "sft", tmp_path)
    assert str(caught.value) == (
        "a.jsonl has no column 'questoin' for 'prompt' (found: question, reply); "
        "did you mean 'question' in prepare.data.sft.columns?"
    )


def test_repeated_ids_are_named_with_both_lines(tmp_path: Path) -> None:
    rows = [{"id": name, "prompt": f"p{name}"} for name in ("a", None, "b", None, "b")]
    put(tmp_path / "a.jsonl", b"\n" + as_json_lines(rows))
    with pytest.raises(UserError, match=r"a.jsonl: id 'b' stands on line 4 and on line 6"):
        load_source(source("a.jsonl"), "prompts", tmp_path)
    put(tmp_path / "a.json", json.dumps(rows))
    with pytest.raises(UserError, match=r"a.json: id 'b' stands on row 3 and on row 5"):
        load_source(source("a.json"), "prompts", tmp_path)


def test_an_own_id_is_kept_beside_ours(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", as_json_lines([{"id": "mine", "prompt": "p"}]))
    (row,) = load_source(source("a.jsonl"), "prompts", tmp_path)
    assert row == {"id": row_id({"prompt": "p", "source_id": "mine"}), "prompt": "p", "source_id": "mine"}
    write_rows(tmp_path / "b.jsonl", [row])
    assert load_source(source("b.jsonl"), "prompts", tmp_path) == [row]


def test_votes_become_one_row_before_the_limit(tmp_path: Path) -> None:
    verdict = {"prompt": "p", "chosen": "a", "rejected": "b"}
    votes = [verdict | {"annotator": "x"}, verdict | {"annotator": "y"}]
    votes.append({"prompt": "p", "chosen": "b", "rejected": "a", "annotator": "z"})
    put(tmp_path / "a.jsonl", as_json_lines([*votes, {**verdict, "prompt": "q", "annotator": "x"}]))
    assert len(load_source(source("a.jsonl"), "preferences", tmp_path)) == 4
    pair, single = load_source(source("a.jsonl", limit=2), "preferences", tmp_path, Treatment("majority"))
    assert (pair["chosen"], pair["votes"], pair["agreement"]) == ("a", 3, pytest.approx(2 / 3))
    assert (single["prompt"], single["annotator"]) == ("q", "x")


def test_limit_takes_rows_from_the_whole_file(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", as_json_lines([{"prompt": str(number)} for number in range(10)]))
    limited = [row["prompt"] for row in load_source(source("a.jsonl", limit=4), "prompts", tmp_path)]
    assert limited == ["0", "2", "5", "7"]
    assert len(load_source(source("a.jsonl", limit=99), "prompts", tmp_path)) == 10


# hub ----------------------------------------------------------------------------------------------


def hub(**changes: Any) -> HubSource:
    values = {"kind": "hub", "name": "someone/pairs", "config": None, "split": "train", "revision": "abc"}
    return HubSource(**values | {"shape": "canonical", "columns": {}, "test_share": 0.2, "limit": None} | changes)


def test_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_source(hub(config="small"), "sft", tmp_path) == with_ids(ROWS)
    assert asked == [(("someone/pairs", "small"), {"split": "train", "revision": "abc"})]
    load_source(hub(name="someone/pairs/harmless/base"), "sft", tmp_path)
    assert asked[1] == (("someone/pairs", None), {"split": "train", "revision": "abc", "data_dir": "harmless/base"})


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach it\nmore"),
            r"cannot be fetched \(Couldn't reach it\); .* local file, which works offline",
        ),
        (
            ValueError('Unknown split "train"'),
            r"does not fit \(Unknown split \"train\"\); mend config None or split 'train'",
        ),
    ],
)
def test_hub_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    import datasets

    def load(*_names: Any, **_options: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=f"hub dataset someone/pairs .*{message}"):
        load_source(hub(), "sft", tmp_path)


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    (tmp_path / "a.parquet").write_bytes(as_parquet(ROWS))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    wanted = hub() if package == "datasets" else source("a.parquet")
    with pytest.raises(UserError, match=f"the package {package} is not installed"):
        load_source(wanted, "sft", tmp_path)


# shapes -------------------------------------------------------------------------------------------


@pytest.fixture
def debate(tmp_path: Path) -> Path:
    """A tiny UKPConvArg1: two topics, gold winners, a tie, a null and a pair on which all voted `equal`."""
    arguments = [
        {
            "id": f"{topic}_{stance}#arg{n}",
            "topic": f"{topic}_{stance}",
            "stance": stance,
            "text": f"{topic} {stance} {n}",
        }
        for topic in ("tea", "war")
        for stance in ("yes", "no")
        for n in (1, 2)
    ]
    golds = {"p0": "a1", "p1": "a2", "p2": "equal", "p3": None, "p4": "a1"}
    votes = {"p0": ["a2", "equal"], "p1": ["a2"], "p2": ["a1"], "p3": ["a1"], "p4": ["equal"]}
    pairs = [
        {
            "id": name,
            "topic": topic,
            "title": f"Is {topic} good?",
            "arg1": f"{topic}#arg1",
            "arg2": f"{topic}#arg2",
            "gold": golds[name],
            "annotations": [{"worker": f"w{name}{n}", "value": value} for n, value in enumerate(votes[name])],
        }
        for name, topic in zip(golds, ("tea_yes", "tea_no", "war_yes", "war_no", "war_no"), strict=True)
    ]
    put(tmp_path / "arguments.jsonl.gz", gzip.compress(as_json_lines(arguments)))
    put(tmp_path / "pairs_5annotators.jsonl.gz", gzip.compress(as_json_lines(pairs)))
    return tmp_path


def test_argument_pairs_are_one_vote_each(debate: Path) -> None:
    rows = load_source(source("pairs_5annotators.jsonl.gz", shape="argument_pairs"), "preferences", debate)
    assert [(row["source_id"], row["annotator"], row["truth_flipped"]) for row in rows] == [
        ("p0", "wp00", True),
        ("p1", "wp10", False),
    ]
    assert rows[0]["prompt"] == [
        {"role": "user", "content": "Write a convincing argument on: Is tea_yes good? Stance: yes."}
    ]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "tea yes 2"}]
    assert rows[0]["rejected"] == [{"role": "assistant", "content": "tea yes 1"}]


def test_argument_kinds_share_their_prompts(debate: Path) -> None:
    texts = load_source(source("arguments.jsonl.gz", shape="argument_texts"), "sft", debate)
    prompts = load_source(source("pairs_5annotators.jsonl.gz", shape="argument_prompts"), "prompts", debate)
    pairs = load_source(source("pairs_5annotators.jsonl.gz", shape="argument_pairs"), "preferences", debate)
    assert [row["completion"][0]["content"] for row in texts] == [
        f"{t} {s} {n}" for t in ("tea", "war") for s in ("yes", "no") for n in (1, 2)
    ]
    assert len(prompts) == 4
    known = [row["prompt"] for row in prompts]
    assert all(row["prompt"] in known for row in texts + pairs)


def test_argument_shapes_need_both_files(debate: Path) -> None:
    (debate / "arguments.jsonl.gz").unlink()
    pairs = source("pairs_5annotators.jsonl.gz", shape="argument_pairs")
    with pytest.raises(UserError, match=r"pairs_5annotators.jsonl.gz needs arguments.jsonl.gz beside it"):
        load_source(pairs, "preferences", debate)
    put(debate / "other.jsonl", as_json_lines(ROWS))
    with pytest.raises(UserError, match=r"other.jsonl is neither pairs_5annotators.jsonl nor arguments.jsonl"):
        load_source(source("other.jsonl", shape="argument_pairs"), "preferences", debate)


# wording ------------------------------------------------------------------------------------------

QUESTION, SYSTEM = {"role": "user", "content": "6 × 7?"}, {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("prompt", "begins"),
    [([QUESTION], [SYSTEM, QUESTION]),
     ([{"role": "system", "content": "Own."}, QUESTION], [SYSTEM | {"content": "Be brief.\n\nOwn."}, QUESTION]),
     (None, None), ([], []), (["odd"], ["odd"])],
)  # fmt: skip
def test_a_system_turn_comes_before_every_conversation(tmp_path: Path, prompt: Any, begins: Any) -> None:
    put(tmp_path / "a.jsonl", as_json_lines([{"prompt": prompt, "answer": "42"}]))
    (row,) = load_source(source("a.jsonl"), "prompts", tmp_path, Treatment(system="Be brief."))
    assert (row["prompt"], row["answer"]) == (begins, "42")


def test_a_text_has_no_system_turn(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(
        UserError, match=r"a.jsonl: the prompt '.*' is a text.*set prepare.data.system to null, or name"
    ):
        load_source(source("a.jsonl"), "sft", tmp_path, Treatment(system="Be brief."))


@pytest.mark.parametrize(
    ("row", "written"),
    [({"completion": "6 × 7 = 42\n#### 42"}, "<r>6 × 7 = 42</r><a>42</a>"),
     ({"completion": "It is {answer}.", "answer": 42}, "<r>It is {answer}.</r><a>42</a>"),
     ({"completion": [{"role": "assistant", "content": "x\n#### 1"}], "answer": None},
      [{"role": "assistant", "content": "<r>x</r><a>1</a>"}]),
     ({"completion": "no answer"}, None), ({"completion": None, "answer": "1"}, None)],
)  # fmt: skip
def test_demonstrations_are_written_in_a_form(tmp_path: Path, row: Row, written: Any) -> None:
    put(tmp_path / "a.jsonl", as_json_lines([{"prompt": "6 × 7?"} | row]))
    form = Treatment(form="<r>{solution}</r><a>{answer}</a>")
    assert [made["completion"] for made in load_source(source("a.jsonl"), "sft", tmp_path, form)] == [written]
    put(tmp_path / "b.jsonl", as_json_lines([{"prompt": "p", "completion": "as it is"}]))
    (rating,) = load_source(source("b.jsonl"), "prompts", tmp_path, form)
    assert rating["completion"] == "as it is"


# splits -------------------------------------------------------------------------------------------


def split_rows(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    with tempfile.TemporaryDirectory() as folder:
        counts = split_by_prompt(rows, "prompts", share, seed, Path(folder))
        train, test = (read_rows(Path(folder) / f"{split}.jsonl") for split in ("train", "test"))
    assert counts == {"train": len(train), "test": len(test)}
    return train, test


def prepared(wanted: FileSource, kind: Any, root: Path, seed: int) -> tuple[list[Row], list[Row]]:
    with tempfile.TemporaryDirectory() as folder:
        prepare_source(wanted, kind, root, seed, Path(folder))
        train, test = (read_rows(Path(folder) / f"{split}.jsonl") for split in ("train", "test"))
    return train, test


@settings(deadline=None, max_examples=60)
@given(
    prompts=st.lists(
        st.one_of(st.text(max_size=3), st.none(), st.lists(st.integers(), max_size=2)), min_size=2, max_size=40
    ),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_prompt_is_never_on_both_sides(prompts: list[Any], share: float, seed: int) -> None:
    rows = [{"prompt": prompt, "number": number} for number, prompt in enumerate(prompts)]
    keys = {json.dumps(prompt) for prompt in prompts}
    if len(keys) < 2 and 0 < share < 1:
        return
    train, test = split_rows(rows, share, seed)
    assert sorted(row["number"] for row in train + test) == list(range(len(rows)))
    assert not {json.dumps(row["prompt"]) for row in train} & {json.dumps(row["prompt"]) for row in test}
    assert (len(test) > 0) == (share > 0)
    assert (len(train) > 0) == (share < 1)
    assert (train, test) == split_rows(rows, share, seed)


def test_a_prompt_has_one_side_in_every_kind(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": f"p{number}", "completion": "c"} for number in range(200)]
    put(tmp_path / "sft.jsonl", as_json_lines(rows))
    put(
        tmp_path / "prompts.jsonl",
        as_json_lines([{"prompt": row["prompt"], "answer": 1} for row in reversed(rows[:150])]),
    )
    train, test = prepared(source("sft.jsonl"), "sft", tmp_path, 3)
    assert 20 <= len(test) <= 60
    prompts_train, prompts_test = prepared(source("prompts.jsonl"), "prompts", tmp_path, 3)
    assert {row["prompt"] for row in prompts_test} <= {row["prompt"] for row in test}
    assert {row["prompt"] for row in prompts_train} <= {row["prompt"] for row in train}
    assert [row["prompt"] for row in prepared(source("sft.jsonl"), "sft", tmp_path, 4)[1]] != [
        row["prompt"] for row in test
    ]


def test_a_single_prompt_cannot_be_shared(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", GOOD * 3)
    with pytest.raises(
        UserError, match=r"prepare.data.sft: all 3 rows have the same prompt, so test_share 0.2 cannot hold any out"
    ):
        prepared(source("a.jsonl"), "sft", tmp_path, 0)
    assert len(prepared(source("a.jsonl", test_share=0.0), "sft", tmp_path, 0)[0]) == 3
