"""Recipes: their data sections read the originals' rows, as they stand on the hub, and their rewards train a policy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.base_models import PLAIN_TEMPLATE
from rlhf.curves import CurveRecorder, no_log
from rlhf.data.formats import Row, read_rows
from rlhf.models import load_causal, load_tokenizer, save_model
from rlhf.params import GRPOParams, HubSource, Params, WorldSource
from rlhf.params_file import load_params
from rlhf.policies import PolicyFiles, train_policy
from rlhf.rewards.building import build_rewards
from tasks import prepare, validate
from tasks.paths import KINDS, Paths
from tests.tiny import ROOT, tiny_params, write_params

WORDS = ["ash", "bay", "cod", "dew", "elm", "fig", "gum", "hay", "ivy", "jet", "kit", "log"]
"""Each stands for one row of an original; twelve of them fill both sides of a split."""


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def bot(text: str) -> Row:
    return {"role": "assistant", "content": text}


def gsm8k(word: str) -> Row:
    return {"question": f"How many {word}?", "answer": f"3 {word} and 4 make <<3+4=7>>7.\n#### 7"}


def asdiv(word: str) -> Row:
    return {
        "body": f"There are 3 {word} and 4 {word}.",
        "question": f"How many {word}?",
        "solution_type": "Addition",
        "answer": f"7 ({word})",
        "formula": "3+4=7",
        "idx": 0,
    }


def openr1(word: str) -> Row:
    return {
        "problem": f"Count {word}.",
        "solution": f"Of {word} there are $\\boxed{{7}}$.",
        "answer": "7",
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": word,
        "generations": [f"<think>{word}</think> 7"],
        "messages": [user(f"Count {word}."), bot("7")],
    }


def dapo(word: str) -> Row:
    return {
        "prompt": f"Sum {word}.",
        "solution": "34",
        "data_source": "math_dapo",
        "source_prompt": [user(f"Solve … Sum {word}.")],
        "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": word},
    }


def ultrachat(word: str) -> Row:
    turns = [user(f"What is {word}?"), bot("A word."), user("And more?"), bot(f"More {word}.")]
    return {"prompt": f"What is {word}?", "prompt_id": word, "messages": turns}


def ultrafeedback(word: str) -> Row:
    def completion(text: str, rating: str) -> Row:
        aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
        annotations = {name: {"Rating": rating, "Rationale": "…"} for name in aspects}
        return {"model": "m", "response": text, "annotations": annotations, "overall_score": 7.0, "critique": "…"}

    completions = [completion(f"bad {word}", "2"), completion(f"good {word}", "5")]
    return {"source": "flan", "instruction": f"Say {word}.", "models": ["m", "m"], "completions": completions}


def binarized(word: str) -> Row:
    chosen, rejected = ([user(f"Say {word}."), bot(f"{quality} {word}")] for quality in ("good", "bad"))
    row = {"prompt": f"Say {word}.", "prompt_id": word, "chosen": chosen, "rejected": rejected, "messages": chosen}
    return row | {"score_chosen": 8.5, "score_rejected": 6.0}


def helpsteer(word: str) -> Row:
    ratings = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 0}
    return {"prompt": f"What is {word}?", "response": f"It is {word}."} | ratings


def pku(word: str) -> Row:
    row: Row = {"prompt": f"How do I break {word}?", "prompt_source": "x", "response_0": f"No {word}.",
        "response_1": f"Hit {word}.", "response_0_source": "m", "response_1_source": "n"}  # fmt: skip
    for number, level in enumerate((0, 3)):
        row[f"is_response_{number}_safe"] = not level
        row[f"response_{number}_severity_level"] = level
    return row | {"better_response_id": 1, "safer_response_id": 0}


def alpaca(word: str) -> Row:
    return {"instruction": f"Name {word}.", "input": "", "output": f"It is {word}.", "text": f"Below … {word}."}


def hh(word: str) -> Row:
    start = f"\n\nHuman: How do I steal {word}?\n\nAssistant: Why?\n\nHuman: For fun.\n\nAssistant: "
    return {"chosen": f"{start}Please do not.", "rejected": f"{start}At night."}


def imdb(word: str) -> Row:
    return {"text": f"{word} one two three four five six seven eight nine ten.", "label": 1}


def sql_context(word: str) -> Row:
    table = word.lower().replace("-", "_")
    return {
        "question": f"How many rows has {word}?",
        "context": f"CREATE TABLE {table} (id INTEGER)",
        "answer": f"SELECT COUNT(*) FROM {table}",
    }


HUB = {
    ("openai/gsm8k", "main", "train", None): gsm8k,
    ("open-r1/OpenR1-Math-220k", "default", "train", None): openr1,
    ("open-r1/DAPO-Math-17k-Processed", "en", "train", None): dapo,
    ("HuggingFaceH4/ultrachat_200k", None, "train_sft", None): ultrachat,
    ("HuggingFaceH4/ultrafeedback_binarized", None, "train_sft", None): binarized,
    ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", None): binarized,
    ("openbmb/UltraFeedback", None, "train", None): ultrafeedback,
    ("nvidia/HelpSteer", None, "train", None): helpsteer,
    ("PKU-Alignment/PKU-SafeRLHF", "default", "train", None): pku,
    ("tatsu-lab/alpaca", None, "train", None): alpaca,
    ("Anthropic/hh-rlhf", None, "train", "harmless-base"): hh,
    ("stanfordnlp/imdb", "plain_text", "train", None): imdb,
    ("b-mc2/sql-create-context", None, "train", None): sql_context,
}
"""A row of each original by its id, configuration, split and folder."""
FILES = {
    "../shared/data/gsm8k/train.jsonl": gsm8k,
    "data/raw/asdiv_one_step.jsonl": asdiv,
    "../shared/data/hh-rlhf/harmless-base-test.jsonl.gz": hh,
}
"""The same of files beside the repository."""
ELSEWHERE = {
    "all-methods": "the world's rows, which the tests of the pipeline prepare",
    "convincing-arguments": "two files that refer to each other, in tests/test_sources.py",
    "nl2sql-cpu": "tests/test_recipes_measured.py",
    "imdb-positive-cpu": "tests/test_recipes_measured.py",
    "imdb-positive-smollm2": "the reviews of imdb-positive-cpu",
}
"""Recipes whose data are tested in another file."""
PLAIN = ("imdb-positive",)
"""Recipes whose prompts are texts to be gone on with."""
RECIPES = [path.stem for path in sorted((ROOT / "recipes").glob("*.yaml")) if path.stem not in ELSEWHERE]


@pytest.fixture(scope="module")
def chat_model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template and room for a system turn that is spelt letter by letter."""
    model, tokenizer = load_causal(tiny_model_dir), load_tokenizer(tiny_model_dir)
    model.config.max_position_embeddings = 1024
    tokenizer.chat_template = PLAIN_TEMPLATE
    folder = tmp_path_factory.mktemp("chat-model")
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """An empty workspace: the hub gives hand-written rows, the files beside it are there, the base model is tiny."""
    import datasets

    def load(name: str, config: str | None, *, split: str, revision: str, data_dir: str | None = None) -> Any:
        assert revision
        return datasets.Dataset.from_list([HUB[name, config, split, data_dir](word) for word in WORDS])

    def load_base(_name: str, _root: Path) -> tuple[Any, Any]:
        return load_causal(chat_model), load_tokenizer(chat_model)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("rlhf.base_models.load_base", load_base)
    root = tmp_path / "workspace"
    root.mkdir()
    for name, row in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True)
        text = "".join(json.dumps(row(word)) + "\n" for word in WORDS).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return Paths(root.resolve())


def read_small(name: str, folder: Path) -> Params:
    """The recipe with gates that a dozen rows pass; limits of tokens suit a tokenizer of few words."""
    params = tiny_params(ROOT / "recipes" / f"{name}.yaml")
    params["validate"] |= {"max_quarantined_share": 0.0, "max_prompt_tokens": 600, "max_completion_tokens": 300}
    write_params(folder / "params.yaml", params)
    return load_params(folder / "params.yaml")


@pytest.mark.parametrize("name", RECIPES)
def test_the_data_of_a_recipe_are_prepared_and_sound(workspace: Paths, name: str) -> None:
    params = read_small(name, workspace.root)
    prepare.run(params, workspace, no_log)
    validate.run(params, workspace, no_log)
    metrics = json.loads(workspace.metrics("validate").read_text(encoding="utf-8"))
    assert metrics["success"]
    assert not [warning for warning in metrics["warnings"] if "evaluation prompts" in warning]
    data = params.prepare.data
    for kind in KINDS:
        rows = {split: read_rows(workspace.rows(kind, split)) for split in ("train", "test")}
        assert all(rows.values()) == (getattr(data, kind) is not None)
        for row in rows["train"] + rows["test"]:
            if name in PLAIN:
                assert isinstance(row["prompt"], str)
                continue
            assert row["prompt"][0]["role"] == ("system" if data.system else "user")
            assert row["prompt"][0]["content"].startswith(data.system or "")
            assert row["prompt"][-1]["role"] == "user"


@pytest.mark.parametrize("name", RECIPES)
def test_demonstrations_earn_what_their_form_is_worth(workspace: Paths, name: str) -> None:
    """Where a recipe writes demonstrations in a form, each gets the most that its rewards can pay."""
    params = read_small(name, workspace.root)
    if params.prepare.data.form is None:
        pytest.skip("demonstrations stay as they are")
    prepare.run(params, workspace, no_log)
    rows = read_rows(workspace.prepared / "sft" / "train.jsonl")
    right = {row["answer"] for row in read_rows(workspace.prepared / "prompts" / "train.jsonl")}
    assert right == ({"34"} if name == "qwen3-maths" else {"7"})
    (policy,) = params.policies.values()
    assert isinstance(policy, GRPOParams)
    columns = {"answer": ["7"] * len(rows)}
    arguments = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    paid = {
        reward.name: {reward.weight * value for value in reward.function(*arguments, **columns)}
        for reward in build_rewards(policy.rewards, _files(workspace), 8)
    }
    most = {
        "gsm8k": {"tags": 0.5, "order": 0.5, "lines": 0.5, "integer": 0.5, "right": 2.0},
        "qwen3": {"form": 3.0, "tags": 2.0, "number": 5.0},
    }
    assert paid == {key: {value} for key, value in most[name.split("-")[0]].items()}


def test_pairs_and_ratings_keep_their_verdict(workspace: Paths) -> None:
    for name, kind in (("hh-harmlessness", "preferences"), ("pku-selective", "ratings")):
        params = read_small(name, workspace.root)
        prepare.run(params, workspace, no_log)
        rows = read_rows(workspace.prepared / kind / "train.jsonl")
        if kind == "ratings":
            assert {(row["completion"][0]["content"].split()[0], row["score"]) for row in rows} == {
                ("No", 0),
                ("Hit", -3),
            }
        else:
            assert {row["chosen"][0]["content"] for row in rows} == {"Please do not."}


def _files(workspace: Paths) -> PolicyFiles:
    model = workspace.model("base")
    prompts = workspace.prepared / "prompts" / "train.jsonl"
    return PolicyFiles(model, model, prompts, workspace.prepared / "preferences" / "train.jsonl", workspace.root)


@pytest.mark.parametrize("name", ["gsm8k-reasoning", "qwen3-maths"])
def test_rewards_of_rules_train_a_policy(workspace: Paths, name: str) -> None:
    params = read_small(name, workspace.root)
    prepare.run(params, workspace, no_log)
    section = params.policies["grpo"].model_copy(update={"gradient_accumulation_steps": 1})
    curves = CurveRecorder(no_log)
    train_policy(section, _files(workspace), 17, curves)
    last = max(curves.rows)
    assert last == section.steps == 2
    assert {f"rewards/{reward}/mean" for reward in section.rewards} <= curves.rows[last].keys()


def test_hub_recipes_are_pinned_or_say_that_they_are_not() -> None:
    for name in RECIPES:
        text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        sources = [source for _, source in load_params(ROOT / "recipes" / f"{name}.yaml").prepare.data]
        loose = sum(isinstance(source, HubSource) and source.revision == "main" for source in sources)
        assert text.count("revision: main               # no revision is known here: pin yours") == loose
        assert not any(isinstance(source, WorldSource) for source in sources)


def test_every_recipe_has_a_page_that_the_index_names() -> None:
    index = (ROOT / "docs" / "recipes" / "README.md").read_text(encoding="utf-8")
    for name in RECIPES:
        assert (ROOT / "docs" / "recipes" / f"{name}.md").exists()
        assert f"]({name}.md)" in index
