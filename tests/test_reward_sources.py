"""Rewards that read more than a text: classifiers, databases and functions of one's own; and what is refused."""

import json
import sqlite3
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from transformers import AutoModelForSequenceClassification

from rlhf.errors import UserError
from rlhf.models import load_tokenizer, save_model
from rlhf.params import Params, RewardMix
from rlhf.policies import PolicyFiles, training_inputs
from rlhf.rewards import sql
from rlhf.rewards.classifiers import ClassifierScore, load_classifier
from rlhf.rewards.own import load_function
from rlhf.rewards.sql import Limits, QueryError, SQLExecution, execute
from rlhf.rewards.tfidf import SETTINGS, WEIGHTS, TextClassifier, train_text_classifier
from rlhf.scoring import check_rows, mixed_reward
from tasks.paths import Paths
from tasks.policy import run
from tests import test_families
from tests.conftest import SHARED
from tests.test_rewards import build, message
from tests.tiny import tiny_params

# classifiers --------------------------------------------------------------------------------------

REVIEWS = [
    *({"text": text, "label": "good"} for text in ("a lovely film", "lovely and warm", "a warm, great film", "great")),
    *(
        {"text": text, "label": "bad"}
        for text in ("a dull film", "dull and awful", "awful awful acting", "a dull mess")
    ),
]
LEARNING = {"ngrams": 2, "features": 100, "inverse_penalty": 10.0}


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentiment")
    train_text_classifier(REVIEWS, folder, **LEARNING)
    return folder


def test_a_small_classifier_says_what_scikit_learn_computes(sentiment):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    reference = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), max_features=100, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000),
    ).fit([row["text"] for row in REVIEWS], [row["label"] for row in REVIEWS])
    texts = ["a lovely, lovely, warm mess", "awful", "", "unheard of"]
    wanted = reference.predict_proba(texts)
    assert wanted[0, 1] > 0.5 > wanted[1, 1]
    for place, label in enumerate(("bad", "good")):
        asked = {"kind": "classifier", "model": ".", "label": label, "reads": "answer"}
        shares = build(sentiment, output="probability", **asked).function
        assert shares([""] * 4, texts) == pytest.approx(wanted[:, place].tolist())
        odds = ClassifierScore(TextClassifier(sentiment), place, "logit", "answer")
        expected = np.log(wanted[:, place] / (1 - wanted[:, place]))
        assert odds([""] * 4, [message(text) for text in texts]) == pytest.approx(expected.tolist())


def test_a_classifier_may_read_the_prompt_too(sentiment):
    both = ClassifierScore(TextClassifier(sentiment), "good", "probability", "prompt_and_answer")
    alone = ClassifierScore(TextClassifier(sentiment), "good", "probability", "answer")
    assert both(["a lov"], ["ely film"]) == alone([""], ["a lovely film"]) != alone([""], ["ely film"])
    assert both([[{"role": "user", "content": "dull"}]], [message("film")]) == alone([""], ["dull\nfilm"])
    assert both([], []) == []


def test_three_labels_have_three_probabilities(tmp_path):
    rows = [*REVIEWS, {"text": "so so", "label": "fair"}, {"text": "so so film", "label": "fair"}]
    train_text_classifier(rows, tmp_path, **LEARNING)
    shares = [
        ClassifierScore(TextClassifier(tmp_path), label, "probability", "answer")([""], ["so so"])[0]
        for label in ("bad", "fair", "good")
    ]
    assert sum(shares) == pytest.approx(1)
    assert shares[1] == max(shares)


def test_the_same_rows_give_the_same_bytes_and_nothing_to_unpickle(sentiment, tmp_path):
    train_text_classifier(REVIEWS, tmp_path, **LEARNING)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((SETTINGS, WEIGHTS))
    for name in (SETTINGS, WEIGHTS):
        assert (tmp_path / name).read_bytes() == (sentiment / name).read_bytes()
    with np.load(tmp_path / WEIGHTS, allow_pickle=False) as weights:
        assert all(np.isfinite(weights[name]).all() for name in weights)


def test_what_is_no_classifier_is_refused(sentiment, tmp_path):
    with pytest.raises(UserError, match="row 2 has no `text` and `label`"):
        train_text_classifier([REVIEWS[0], {"text": "x"}], tmp_path, **LEARNING)
    with pytest.raises(UserError, match="all rows have the label good; a classifier needs two"):
        train_text_classifier(REVIEWS[:2], tmp_path, **LEARNING)
    for label in ("fine", 2):
        with pytest.raises(UserError, match=f"has no label {label!r}; it has bad, good"):
            ClassifierScore(TextClassifier(sentiment), label, "logit", "answer")
    (tmp_path / SETTINGS).write_text("{}")
    with pytest.raises(UserError, match="holds no classifier of ours"):
        load_classifier(".", tmp_path, 2)
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(UserError, match="the classifier .* does not load"):
        load_classifier(".", tmp_path, 2)


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_a_classifier_of_transformers_says_what_its_head_does(tiny_reward_dir, tmp_path, kind):
    """Its labels exclude each other, or each is judged for itself."""
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_reward_dir, num_labels=3, ignore_mismatched_sizes=True
    )
    model.config.problem_type = kind
    tokenizer = load_tokenizer(tiny_reward_dir)
    save_model(model, tokenizer, tmp_path)
    texts = ["three apples", "x", "", "so " * 500]
    loaded = load_classifier(".", tmp_path, 3)
    shares, odds = (
        np.array([ClassifierScore(loaded, label, output, "answer")([""] * 4, texts) for label in ("LABEL_0", 1, 2)])
        for output in ("probability", "logit")
    )
    assert np.allclose(odds, np.log(shares / (1 - shares)), atol=1e-6)
    logits = model.eval()(**tokenizer(texts[0], return_tensors="pt")).logits[0].double()
    expected = logits.softmax(0) if kind.startswith("single") else logits.sigmoid()
    assert shares[:, 0] == pytest.approx(expected.tolist(), abs=1e-5)


# SQL ----------------------------------------------------------------------------------------------

TEXT2SQL = SHARED / "data" / "text2sql"
LIMITS = Limits(max_steps=300_000, seconds=20.0, max_rows=100)
JUDGED = {"answer_in": "text", "runs": 0.1, "max_failing_share": 0.0}


@pytest.fixture(scope="module")
def geo(tmp_path_factory):
    """Three cities in two states, in a file whose name a URI would misread."""
    path = tmp_path_factory.mktemp("sql") / "geo ?#.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE city (name TEXT, state TEXT, people INTEGER, area REAL)")
    rows = [("Austin", "Texas", 9, 0.1), ("Dallas", "Texas", 13, 0.2), ("Boise", "Idaho", 2, 0.3)]
    connection.executemany("INSERT INTO city VALUES (?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    return path


@pytest.mark.parametrize(
    ("query", "right", "reward"),
    [
        ("SELECT name FROM city", "SELECT name FROM city", 1.0),
        ("select NAME from CITY;", "SELECT name FROM city", 1.0),
        ("SELECT name FROM city ORDER BY people DESC", "SELECT name FROM city", 1.0),
        ("SELECT name FROM city", "SELECT name FROM city ORDER BY people DESC", 0.1),
        ("SELECT name FROM city ORDER BY 0 - people", "SELECT name FROM city ORDER BY people DESC", 1.0),
        ("SELECT DISTINCT state FROM city", "SELECT state FROM city", 0.1),
        ("SELECT state FROM city UNION ALL SELECT 'x' WHERE 0", "SELECT state FROM city", 1.0),
        ("WITH t AS (SELECT * FROM city) SELECT sum(area) FROM t", "SELECT 0.6", 1.0),
        ("SELECT count(*) FROM city WHERE state = 'Texas'", "SELECT 2", 1.0),
        ("SELECT '2'", "SELECT 2", 0.1),
        ("SELECT name, state FROM city", "SELECT state, name FROM city", 0.1),
        ("SELECT NULL", "SELECT NULL", 1.0),
        ("SELECT mayor FROM city", "SELECT name FROM city", 0.0),
        ("", "SELECT name FROM city", 0.0),
    ],
)
def test_a_query_is_judged_by_what_it_gives(geo, query, right, reward):
    judge = SQLExecution(geo, limits=LIMITS, **JUDGED)
    assert judge(["q"] * 2, [query, message(query)], answer=[right] * 2) == [reward] * 2


HOSTILE = {
    "write": "INSERT INTO city VALUES ('X', 'Y', 1, 1)",
    "drop": "DROP TABLE city",
    "create": "CREATE TABLE x AS SELECT 1",
    "delete in a with": "WITH t AS (SELECT 1) DELETE FROM city",
    "two statements": "SELECT 1; DROP TABLE city",
    "attach": "ATTACH DATABASE 'alignflow-x.db' AS x",
    "vacuum": "VACUUM INTO 'alignflow-x.db'",
    "pragma": "PRAGMA writable_schema = 1",
    "pragma as a table": "SELECT * FROM pragma_database_list",
    "transaction": "BEGIN",
    "extension": "SELECT load_extension('x.so')",
    "file": "SELECT readfile('/etc/passwd')",
    "chance": "SELECT random()",
    "endless": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    "endless rows": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
    "product": "SELECT count(*) FROM " + ", ".join(f"city c{number}" for number in range(20)),
    "large value": "SELECT zeroblob(2000000000)",
    "large rows": (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 90) SELECT zeroblob(999000) FROM n"
    ),
    "growing value": (
        "WITH RECURSIVE n(i, t) AS (SELECT 1, 'x' UNION ALL SELECT i + 1, t || t FROM n LIMIT 40) SELECT max(t) FROM n"
    ),
    "pattern": "SELECT '" + "a" * 5000 + "' LIKE '" + "%a" * 1000 + "b'",
    "depth": "SELECT " + "(" * 4000 + "1" + ")" * 4000,
    "length": "SELECT " + "1+" * 400_000 + "1",
    "null byte": "SELECT 1\0",
    "half a character": "SELECT '\ud800'",
    "comment": "-- nothing",
    "prose": "The answer is Austin.",
}


@pytest.mark.parametrize("query", HOSTILE.values(), ids=HOSTILE)
def test_hostile_queries_earn_nothing_and_leave_all_as_it_is(geo, query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = geo.read_bytes()
    judge = SQLExecution(geo, limits=LIMITS, **JUDGED)
    assert judge(["q"], [query], answer=["SELECT name FROM city"]) == [0.0]
    assert geo.read_bytes() == before
    assert [path.name for path in geo.parent.iterdir()] == [geo.name]
    assert not list(tmp_path.iterdir())


def test_only_reading_is_allowed_even_where_the_parser_errs(geo, monkeypatch, tmp_path):
    """Each guard must do alone: without the check of the statement, authorizer and mode remain."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sql, "_is_ordered", lambda query: False)
    for name in ("write", "drop", "create", "delete in a with", "two statements", "attach", "vacuum", "pragma"):
        with pytest.raises(QueryError):
            execute(geo, HOSTILE[name], LIMITS)
    assert not list(tmp_path.iterdir())


def test_a_query_ends_at_its_limits(geo):
    product = "SELECT count(*) FROM city a, city b, city c, city d, city e"
    assert execute(geo, product, Limits(50_000, 20.0, 10)).rows == [(3**5,)]
    larger = product + ", city f, city g, city h, city i, city j"  # about 300,000 instructions
    assert execute(geo, larger, Limits(10**7, 60.0, 10)).rows == [(3**10,)]
    for limits in (Limits(50_000, 60.0, 10), Limits(10**7, 0.0, 10)):
        with pytest.raises(QueryError, match="interrupted"):
            execute(geo, larger, limits)
    with pytest.raises(QueryError, match="more than 2 rows"):
        execute(geo, "SELECT name FROM city", Limits(50_000, 20.0, 2))
    with pytest.raises(QueryError, match="too large a result"):
        execute(geo, HOSTILE["large rows"], LIMITS)


WORDS = ["SELECT", "FROM", "WITH", "city", "name", "*", "(", ")", ",", ";", "'", "--", "1", "="]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(WORDS)).map(" ".join)))
def test_any_text_is_a_query_that_earns_something_or_nothing(geo, text):
    judge = SQLExecution(geo, limits=LIMITS, **JUDGED)
    assert judge(["q"], [text], answer=["SELECT name FROM city"])[0] in (0.0, 0.1, 1.0)


def test_right_queries_are_checked_before_training_and_run_once(geo, monkeypatch):
    limits = {"max_steps": 10**6, "seconds": 20.0, "max_rows": 10}
    reward = build(geo.parent, kind="sql", databases=geo.name, **limits, **JUDGED)
    rows = [{"id": f"row{number}", "prompt": "q", "answer": "SELECT name FROM city"} for number in range(3)]
    check_rows([reward], rows)
    calls = Counter()

    def counted(path, query, limits):
        calls[query] += 1
        return execute(path, query, limits)

    monkeypatch.setattr(sql, "execute", counted)
    assert reward.function(["q"], ["SELECT 1"], answer=["SELECT name FROM city"]) == [0.1]
    assert calls == {"SELECT 1": 1}
    rows[1]["answer"] = "SELECT mayor FROM city"
    with pytest.raises(UserError, match=r"1 of 3 right queries .* 'row1' \(no such column: mayor\); drop or mend"):
        check_rows([reward], rows)
    with pytest.raises(UserError, match="has no `answer`"):
        check_rows([reward], [{"id": "x", "prompt": "q"}])


def test_a_few_failing_right_queries_pay_nothing_where_params_allow_them(geo, caplog):
    judge = SQLExecution(geo, limits=LIMITS, **JUDGED | {"max_failing_share": 0.5})
    fine, broken = "SELECT name FROM city", "SELECT mayor FROM city"
    rows = [{"id": query, "prompt": "q", "answer": query} for query in (fine, broken)]
    judge.check(rows)
    assert "1 of 2 right queries do not execute" in caplog.text
    assert judge(["q", "q", "q"], [broken, fine, fine], answer=[broken, broken, fine]) == [0.0, 0.0, 1.0]
    with pytest.raises(UserError, match="1 of 1 right queries"):
        judge.check(rows[1:])


def test_a_row_may_name_its_database_within_the_folder(geo):
    judge = SQLExecution(geo.parent, limits=LIMITS, **JUDGED)
    query = "SELECT name FROM city"
    assert judge(["q"], [query], answer=[query], database=[geo.name]) == [1.0]
    outside = geo.parent.parent / "outside.sqlite"
    outside.write_bytes(geo.read_bytes())
    for name in (None, "none.sqlite", "../outside.sqlite", str(outside)):
        with pytest.raises(UserError, match="the column `database` is .*, which is no file in"):
            judge(["q"], [query], answer=[query], database=[name])
    with pytest.raises(UserError, match="does not exist; give an SQLite file or a folder"):
        SQLExecution(geo.parent / "none", limits=LIMITS, **JUDGED)


@pytest.mark.skipif(not TEXT2SQL.exists(), reason="the text-to-SQL data are not beside the repository")
def test_the_right_queries_of_geoquery_execute():
    """872 of 877, as plain SQLite gives; the five others name a column that is not there or ask for ALL."""
    database = TEXT2SQL / "geography-db.added-in-2020.sqlite"
    executed: Counter[bool] = Counter()
    for entry in json.loads((TEXT2SQL / "geography.json").read_text(encoding="utf-8")):
        for sentence in entry["sentences"]:
            query = entry["sql"][0]
            for name, value in sentence["variables"].items():
                query = query.replace(name, value)
            try:
                execute(database, query, Limits(5_000_000, 60.0, 10_000))
                executed[True] += 1
            except QueryError:
                executed[False] += 1
    assert executed == {True: 872, False: 5}


# one's own ----------------------------------------------------------------------------------------


def test_a_function_of_ones_own_is_a_reward(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Points:\n"
        "    each: float\n\ndef score(prompts, completions, *, answer, **columns):\n"
        "    return [Points(2.0).each * len(right) for right in answer]\n"
    )
    reward = build(tmp_path, kind="function", path="mine.py", name="score")
    total, parts = mixed_reward([reward], ["p"], ["c"], {"answer": ["ab"], "id": ["x"]})
    assert (total, parts) == ([4.0], {"mine": [4.0]})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("score = 3", "has no function 'score'; write `def score"),
        ("", "has no function 'score'"),
        ("def score(prompts): return []", r"score takes \(prompts\), but is called with \(prompts, completions"),
        ("def score(prompts, completions): return []", "change its arguments to that"),
        ("def score(prompts, completions, more, **columns): return []", "change its arguments to that"),
        ("def score(*, completions, **columns): return []", "change its arguments to that"),
        ("import nothing_of_that_name", r"does not load \(ModuleNotFoundError"),
        ("def score(", r"does not load \(SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(tmp_path, text, complaint):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=complaint):
        load_function(tmp_path / "mine.py", "score")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.py, which the reward 'function' names, does not exist"):
        load_function(tmp_path / "none.py", "score")


MINE = {"kind": "function", "weight": 1.0, "path": "mine.py", "name": "score"}


def test_what_rewards_read_is_among_the_inputs_of_a_training(policy_files, tmp_path):
    """So that a checkpoint of another function, database or classifier is not gone on from."""
    (tmp_path / "mine.py").write_text("")
    hub = {"kind": "classifier", "weight": 1.0, "model": "a/b", "label": 1, "output": "logit", "reads": "answer"}
    rewards = TypeAdapter(RewardMix).validate_python({"mine": MINE, "hub": hub})
    files = PolicyFiles(policy_files.sft, policy_files.reward, policy_files.prompts, policy_files.preferences, tmp_path)
    params = test_families.PARAMS.policies["grpo"].model_copy(update={"rewards": rewards})
    assert training_inputs(params, files) == [files.sft, files.prompts, tmp_path / "mine.py"]


def test_the_stage_refuses_what_dvc_does_not_watch(tmp_path):
    (tmp_path / "dvc.yaml").write_text("stages: {policy: {do: {deps: [rewards]}}}")
    (tmp_path / "rewards").mkdir()
    raw = tiny_params()
    raw["evaluate"]["watch"] = None

    def train_with(path):
        (tmp_path / path).write_text("")
        raw["policies"]["grpo"]["rewards"] = {"mine": {**MINE, "path": path}}
        run(Params.model_validate(raw), Paths(tmp_path), lambda *_: None, "grpo")

    with pytest.raises(UserError, match=r"policies\.grpo\.rewards reads mine\.py, which is no dep of the stage policy"):
        train_with("mine.py")
    with pytest.raises(FileNotFoundError):  # the SFT model is missing, for which it looks later
        train_with("rewards/mine.py")
