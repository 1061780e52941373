"""Recipes with rewards that need no pairs: their data pass the gates, a policy learns from what its queries give."""

from __future__ import annotations

import csv
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from typer.testing import CliRunner

from alignflow import app
from alignflow_data import train_classifier
from rlhf.curves import CurveRecorder, no_log
from rlhf.data.formats import read_rows, with_ids, write_rows
from rlhf.errors import UserError
from rlhf.evaluation.generation import Decoding, generate
from rlhf.models import load_causal, load_tokenizer, save_model, set_determinism
from rlhf.params import Params
from rlhf.params_file import load_params
from rlhf.policies import PolicyFiles, train_policy
from rlhf.rewards.tfidf import TextClassifier
from tasks import prepare, validate
from tasks.paths import Paths
from tests.conftest import ROOT, SHARED

NAMES = ("nl2sql", "nl2sql-cpu", "imdb-positive", "imdb-positive-cpu", "imdb-positive-smollm2")
needs_model = pytest.mark.skipif(
    not (SHARED / "models" / "stories260K").exists(), reason="the model stories260K is not beside the repository"
)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_has_a_page(name):
    load_params(ROOT / "recipes" / f"{name}.yaml")
    page = name.removesuffix("-cpu").removesuffix("-smollm2")
    assert f"`{name}`" in (ROOT / "docs" / "recipes" / f"{page}.md").read_text(encoding="utf-8")


def prepare_recipe(name: str, root: Path, limit: int) -> dict[str, Any]:
    """The figures of `validate` on about `limit` rows of a recipe's data, its gates as they are."""
    values = YAML(typ="safe").load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    for kind in ("sft", "prompts"):
        values["prepare"]["data"][kind]["limit"] = limit
    params, paths = Params.model_validate(values), Paths(root)
    root.mkdir(exist_ok=True)
    (root.parent / "shared").symlink_to(SHARED)
    prepare.run(params, paths, no_log)
    validate.run(params, paths, no_log)
    return json.loads(paths.metrics("validate").read_text(encoding="utf-8"))


@needs_model
@pytest.mark.skipif(not (SHARED / "data" / "text2sql").exists(), reason="GeoQuery is not beside the repository")
def test_geoquery_passes_the_gates_of_its_recipe(tmp_path):
    figures = prepare_recipe("nl2sql-cpu", tmp_path / "workspace", 150)
    assert figures["success"]
    assert figures["prompts"]["rows_kept"] > 130
    prompts = read_rows(Paths(tmp_path / "workspace").rows("prompts", "train"))
    assert all(row["answer"].startswith("SELECT ") for row in prompts)


@needs_model
def test_reviews_pass_the_gates_of_their_recipe(tmp_path):
    root = tmp_path / "workspace"
    (root / "data" / "raw").mkdir(parents=True)
    with (root / "data" / "raw" / "movie_reviews.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for number in range(200):
            long = "and on it goes , word after word . " * (40 if number % 3 == 0 else 1)
            writer.writerow([f"number {number} is a film that nobody will forget soon {long}", number % 2, "imdb"])
    figures = prepare_recipe("imdb-positive-cpu", root, 200)
    assert figures["success"]
    assert figures["sft"]["quarantined"].keys() <= {"completion_too_long", "longer_than_context"}
    assert figures["sft"]["rows_quarantined"] == 67
    assert figures["prompts"]["rows_kept"] == 200


def test_a_classifier_is_made_by_one_command(tmp_path):
    """The measure is taken on the rows that it did not learn from: there all labels of odd rows are turned round."""
    texts = {1: "a fine and lovely film", 0: "a dull and dreary film"}
    rows = [{"review": texts[number // 2 % 2], "mood": str((number // 2 + number) % 2)} for number in range(40)]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = ["--text", "review", "--label", "mood"]
    made = CliRunner().invoke(
        app, ["data", "classifier", str(tmp_path / "reviews.jsonl"), "--folder", str(tmp_path / "mood"), *columns]
    )
    assert made.exit_code == 0, made.output
    assert "0.000 of the 20 rows of other parts" in made.output
    odds = TextClassifier(tmp_path / "mood").log_odds(list(texts.values()))
    assert (odds[:, 1] > 0).tolist() == [True, False]
    with pytest.raises(UserError, match="--part is 3 of 2 parts"):
        train_classifier(tmp_path / "reviews.jsonl", tmp_path / "mood", part=3)


RIGHT, WRONG = "SELECT 1", "SELECT 2"


@pytest.fixture
def query_files(tmp_path, tiny_model_dir) -> PolicyFiles:
    """A tiny model that gives the right query half of the time, questions and a toy database."""
    set_determinism(0)
    model, tokenizer = load_causal(tiny_model_dir), load_tokenizer(tiny_model_dir)
    _learn(model, tokenizer, [f"one? {query}" for query in (RIGHT, WRONG)])
    save_model(model, tokenizer, tmp_path / "sft")
    with closing(sqlite3.connect(tmp_path / "toy.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE ones (number INTEGER)")
        connection.execute("INSERT INTO ones VALUES (1)")
    rows = with_ids([{"prompt": "one?", "answer": "SELECT number FROM ones", "place": place} for place in range(8)])
    write_rows(tmp_path / "prompts.jsonl", rows)
    nothing = tmp_path / "nothing"
    return PolicyFiles(
        sft=tmp_path / "sft", reward=nothing, prompts=tmp_path / "prompts.jsonl", preferences=nothing, root=tmp_path
    )


def _learn(model: Any, tokenizer: Any, texts: list[str]) -> None:
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    batch = torch.tensor(ids)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def test_grpo_learns_from_what_queries_give(query_files):
    """Half of the answers give the row of the right query, which is another text; thirty steps make it most of them."""
    values = YAML(typ="safe").load((ROOT / "recipes" / "nl2sql-cpu.yaml").read_text(encoding="utf-8"))
    grpo = values["policies"]["grpo"]
    grpo["rewards"]["sql"]["databases"] = "toy.sqlite"
    grpo |= {"steps": 30, "batch_size": 32, "group_size": 8, "max_new_tokens": 12, "learning_rate": 0.02, "beta": 0.0}
    section = Params.model_validate(values).policies["grpo"]
    curves = CurveRecorder(no_log)
    policy = train_policy(section, query_files, 0, curves)
    rewards = [row["rewards/sql/mean"] for _, row in sorted(curves.rows.items()) if "rewards/sql/mean" in row]
    assert 0.1 < rewards[0] < 0.9
    assert rewards[-1] > 0.95
    (answer,) = generate(policy, load_tokenizer(query_files.sft), ["one?"], Decoding(12, 0.0, 1, 0))
    assert answer.text.strip() == RIGHT
