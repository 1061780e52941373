"""The record of a run: complete where MLflow answers, delayed and never doubled where it does not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from rlhf.errors import UserError
from rlhf.health import write_health
from rlhf.params import Params
from rlhf.params_file import load_params
from tasks.paths import Paths
from tasks.tracking import Stage, flow_environment, lineage, shipping, spool, store, tracked_run
from tasks.tracking.models import find_model, log_model
from tasks.tracking.recording import metric_name

# MLflow 3.17 warns of itself, with the newest SQLAlchemy and pandas.
pytestmark = pytest.mark.filterwarnings(r"ignore:::mlflow(\.|$)")

ROOT = Path(__file__).resolve().parents[1]
SFT = Stage("sft")
DEAD = "http://127.0.0.1:9"
PIPELINE = """
stages:
  sft:
    cmd: python -m tasks sft
    deps: [data/validated/sft, models/base]
    outs: [models/sft, reports/sft]
    metrics: [metrics/sft.json: {cache: false}]
  policy:
    foreach: ${policies}
    do:
      cmd: python -m tasks policy ${key}
      deps: [models/sft, data/validated/prompts/train.jsonl]
      outs: ["models/policy/${key}"]
      metrics:
        - metrics/policy/${key}.json:
            cache: false
"""


@pytest.fixture(scope="session")
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `lm` and `rm` with a random causal and a random reward model over bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", eos_token="<eos>")
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens)).save_pretrained(folder / "lm")
    sizes["num_labels"] = 1
    LlamaForSequenceClassification(LlamaConfig(**sizes, **tokens)).save_pretrained(folder / "rm")
    for name in ("lm", "rm"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, made once: its migration takes seconds."""
    import mlflow

    store.quieten_mlflow()
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def paths(tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A workspace with a pipeline, data and an empty MLflow store of its own."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", lineage.FLOW_RUN, lineage.PARENT_KEY, lineage.PARENT_NAME):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tasks.tracking.recording.LOCAL_SECONDS", 300.0)  # a busy machine must not fail a test
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "data/validated/sft").mkdir(parents=True)
    (tmp_path / "data/validated/sft/train.jsonl").write_text('{"prompt": "1 + 1"}\n')
    (tmp_path / "mlruns").mkdir()
    shutil.copy(migrated_store, tmp_path / "mlruns/mlflow.db")
    return Paths(tmp_path)


def _train(paths: Paths, params: Params, tiny_models: Path, stage: Stage = SFT) -> None:
    """A stage body in small: a curve, a model, a figure, samples, final metrics."""
    with tracked_run(stage, params, paths) as log:
        for step in range(3):
            log({"loss": 1 / (step + 1), "rewards/λ": 0.5}, step)
        shutil.copytree(tiny_models / "lm", paths.model(stage.name, stage.item))
        report = paths.report(stage.name, stage.item)
        report.mkdir(parents=True)
        (report / "samples.json").write_text(json.dumps([{"prompt": "a", "answer": "b"}, {"prompt": "c"}]))
        (report / "figure.html").write_text("<b>figure</b>")
        write_health(report, "sft", {1: {"grad_norm": 0.0}})
        metrics = paths.metrics(stage.name, stage.item)
        metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_text(json.dumps({"loss": 0.25, "per": {"token": 2}}))


def _runs(paths: Paths) -> tuple[Any, dict[str, Any]]:
    client, experiment = store.connect(store.tracking_uri(paths), paths)
    runs = client.search_runs([experiment])
    by_name: dict[str, Any] = {str(run.info.run_name): run for run in runs}
    assert len(by_name) == len(runs), "a run was made twice"
    return client, by_name


def test_a_reward_model_answers_with_its_raw_score(paths: Paths, tiny_models: Path) -> None:
    import mlflow
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    client, experiment = store.connect(store.tracking_uri(paths), paths)
    run_id = client.create_run(experiment).info.run_id
    model_id = log_model(client, run_id, tiny_models / "rm", "md5")
    assert log_model(client, run_id, tiny_models / "rm", "md5") == model_id, "sent again, it is there already"

    score = mlflow.pyfunc.load_model(f"models:/{model_id}").predict(["1 + 1 = 2"])["score"][0]
    tokens = AutoTokenizer.from_pretrained(tiny_models / "rm")("1 + 1 = 2", return_tensors="pt")
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(tiny_models / "rm")(**tokens).logits.item()
    assert score == pytest.approx(expected, abs=1e-5)


def _waiting(paths: Paths) -> list[Path]:
    return spool.journals(paths.state / "spool")


def test_a_stage_leaves_a_complete_run_under_its_parent(paths: Paths, params: Params, tiny_models: Path) -> None:
    import mlflow
    from mlflow import transformers as flavour

    _train(paths, params, tiny_models)

    assert _waiting(paths) == []
    client, runs = _runs(paths)
    run = runs.pop("sft")
    (parent,) = runs.values()
    assert (run.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.params["sft.learning_rate"] == str(params.sft.learning_rate)
    assert set(run.data.params) == {
        key for key in lineage.flat_params(params) if key == "seed" or key.startswith(("sft.", "ledger."))
    }
    assert parent.data.params == lineage.flat_params(params)
    assert run.data.metrics["sft/loss"] == 0.25, "the final figure, not a point of the curve, is the latest"
    points = client.get_metric_history(run.info.run_id, "sft/loss")
    assert [(point.step, point.value) for point in points] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3)), (2, 0.25)]
    assert run.data.metrics["sft/per/token"] == parent.data.metrics["sft/per/token"] == 2
    assert run.data.metrics["sft/rewards/_"] == 0.5
    assert "system/process_memory_megabytes" in run.data.metrics
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "data/validated/sft/train.jsonl"
    assert dataset.dataset.digest == lineage.hash_path(paths.rows("sft", "train"))
    md5 = lineage.hash_path(paths.model("sft"))
    assert run.data.tags["output/models/sft"] == md5
    assert run.data.tags["input/data/validated/sft"].endswith(".dir")
    assert run.data.tags["alignflow.git_commit"] == "none"
    assert run.data.tags["alignflow.health"] == "stop"
    assert run.data.tags["alignflow.health.no gradient"].startswith("stop; gradient norm")
    assert [file.path for file in client.list_artifacts(run.info.run_id, "reports")] == [
        "reports/figure.html",
        "reports/health.json",
    ]
    table = client.load_table(run.info.experiment_id, "samples.json", [run.info.run_id])
    assert list(table["prompt"]) == ["a", "c"]
    model = find_model(client, run.info.experiment_id, md5)
    assert model is not None
    assert model.source_run_id == run.info.run_id
    answer = mlflow.pyfunc.load_model(f"models:/{model.model_id}").predict(["1 + 1"], params={"max_new_tokens": 2})
    assert isinstance(answer[0], str)
    pipeline: Any = flavour.load_model(f"models:/{model.model_id}")
    assert pipeline.task == "text-generation"


def test_stages_of_one_flow_share_a_parent_and_name_their_parent_models(
    paths: Paths, params: Params, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in flow_environment("7", "brave-otter").items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("tasks.tracking.recording.MODEL_STAGES", ("sft",))
    name = next(iter(params.policies))
    _train(paths, params, tiny_models)
    _train(paths, params, tiny_models, Stage("policy", name))

    client, runs = _runs(paths)
    assert set(runs) == {"brave-otter", "sft", f"policy@{name}"}
    policy = runs[f"policy@{name}"]
    assert policy.data.tags["mlflow.parentRunId"] == runs["brave-otter"].info.run_id
    assert policy.data.tags["alignflow.flow_run"] == "7"
    assert policy.data.tags["alignflow.policy"] == name
    assert f"policies.{name}.algorithm" in policy.data.params
    assert len(client.get_run(policy.info.run_id).inputs.model_inputs) == 1, "the SFT model it started from"
    assert runs["brave-otter"].data.metrics[f"policy/{name}/loss"] == 0.25


def test_a_dead_server_costs_one_warning_and_the_record_is_sent_later_once(
    paths: Paths, params: Params, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING):
        _train(paths, params, tiny_models)
    assert [DEAD in record.message for record in caplog.records] == [True]
    assert len(_waiting(paths)) == 1
    with pytest.raises(UserError, match="127.0.0.1:9 does not answer"):
        shipping.sync(paths)

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert shipping.ship_pending(paths) == (1, 0)
    assert shipping.ship_pending(paths) == (0, 0)
    client, runs = _runs(paths)
    assert runs["sft"].info.status == "FINISHED"
    assert len(client.get_metric_history(runs["sft"].info.run_id, "sft/loss")) == 4
    assert find_model(client, runs["sft"].info.experiment_id, runs["sft"].data.tags["output/models/sft"])


def _journal(paths: Paths, points: int = 3) -> Path:
    """A journal of a run that has ended, written without a process beside it."""
    journal = spool.Journal(paths.state / "spool" / "one")
    group = {"key": "k", "name": "flow"}
    start = {"name": "sft", "group": group, "tags": {}, "params": {"seed": "1"}}
    journal.write("start", start)
    for step in range(points):
        journal.write("metrics", {"values": {"sft/loss": float(step)}, "step": step})
        journal.write("tags", {"values": {f"tag{step}": "x"}})
    journal.write("end", {"status": "FINISHED", "error": None})
    journal.close()
    return journal.folder


@pytest.mark.parametrize("survived", range(1, 12))
def test_a_server_that_dies_after_any_request_gets_the_rest_later_and_nothing_twice(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    folder = _journal(paths)
    client, _ = store.connect(store.tracking_uri(paths), paths)
    calls = 0
    sent: list[int] = []
    log_batch = client.log_batch

    def count(run_id: str, **batch: Any) -> None:
        log_batch(run_id, **batch)
        sent.extend(metric.step for metric in batch.get("metrics", []))

    monkeypatch.setattr(client, "log_batch", count)

    def dying(method: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > survived:
                raise ConnectionError("the server is gone")
            return method(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in ("create_run", "log_batch", "set_terminated", "set_tag", "search_runs"):
            patch.setattr(client, name, dying(getattr(client, name)))
        with pytest.raises(ConnectionError):
            shipping.ship_journal(folder, paths)
    assert spool.load_progress(folder).error == "ConnectionError: the server is gone"

    assert shipping.ship_journal(folder, paths)
    client, runs = _runs(paths)
    assert set(runs) == {"sft", "flow"}
    history = client.get_metric_history(runs["sft"].info.run_id, "sft/loss")
    assert [(point.step, point.value) for point in history] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert sent == [0, 1, 2]
    assert runs["sft"].info.status == "FINISHED"
    assert not folder.exists()


def test_an_event_that_mlflow_refuses_is_given_up_and_the_rest_arrives(paths: Paths) -> None:
    journal = spool.Journal(paths.state / "spool" / "one")
    journal.write("start", {"name": "sft", "group": {"key": "k", "name": "flow"}, "tags": {}, "params": {}})
    journal.write("artifact", {"path": "reports/gone.png", "md5": "0", "to": "reports"})
    journal.write("metrics", {"values": {"sft/loss": 1.0}, "step": 0})
    journal.write("end", {"status": "FINISHED", "error": None})
    journal.close()

    assert shipping.ship_pending(paths) == (1, 0)
    _, runs = _runs(paths)
    assert runs["sft"].data.metrics == {"sft/loss": 1.0}
    assert "gone.png" in runs["sft"].data.tags["alignflow.lost.artifact"]


def test_of_two_values_in_one_millisecond_the_last_is_the_latest(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool.time, "time", lambda: 1_700_000_000.0)
    journal = spool.Journal(paths.state / "spool" / "one")
    journal.write("start", {"name": "sft", "group": {"key": "k", "name": "flow"}, "tags": {}, "params": {}})
    for value in (0.5, 0.25):
        journal.write("metrics", {"values": {"sft/loss": value}, "step": 2})
    journal.write("end", {"status": "FINISHED", "error": None})
    journal.close()

    shipping.ship_pending(paths)
    _, runs = _runs(paths)
    assert runs["sft"].data.metrics == {"sft/loss": 0.25}


def test_a_file_that_changed_before_it_was_sent_is_left_out(paths: Paths) -> None:
    (paths.root / "figure.txt").write_text("a later run's")
    journal = spool.Journal(paths.state / "spool" / "one")
    journal.write("start", {"name": "sft", "group": {"key": "k", "name": "flow"}, "tags": {}, "params": {}})
    journal.write("artifact", {"path": "figure.txt", "md5": "of-this-run", "to": "reports"})
    journal.write("end", {"status": "FINISHED", "error": None})
    journal.close()

    shipping.ship_pending(paths)
    client, runs = _runs(paths)
    assert client.list_artifacts(runs["sft"].info.run_id) == []
    assert "has changed" in runs["sft"].data.tags["alignflow.lost.artifact"]


def test_a_journal_whose_writer_died_is_sent_as_killed_and_a_living_one_is_left_alone(paths: Paths) -> None:
    journal = spool.Journal(paths.state / "spool" / "one")
    journal.write("start", {"name": "sft", "group": {"key": "k", "name": "flow"}, "tags": {}, "params": {}})
    assert shipping.ship_pending(paths) == (0, 0)
    journal.close()

    with (journal.folder / spool.EVENTS).open("a") as file:
        file.write('{"kind": "metrics", "val')  # torn by the death
    assert shipping.ship_pending(paths) == (1, 0)
    _, runs = _runs(paths)
    assert runs["sft"].info.status == "KILLED"
    assert "disappeared" in runs["sft"].data.tags["alignflow.error"]


def test_two_processes_do_not_send_one_journal_at_once(paths: Paths) -> None:
    folder = _journal(paths)
    with spool.locked(folder / spool.SHIPPER, wait=False) as ours:
        assert ours
        assert not shipping.ship_journal(folder, paths)
    assert spool.load_progress(folder).offset == 0


def test_a_failing_stage_leaves_a_failed_run_with_the_sentence(paths: Paths, params: Params) -> None:
    with pytest.raises(UserError), tracked_run(Stage("sft"), params, paths):
        raise UserError("too many rows are broken")
    _, runs = _runs(paths)
    assert runs["sft"].info.status == "FAILED"
    assert runs["sft"].data.tags["alignflow.error"] == "too many rows are broken"
    assert {run.info.status for run in runs.values()} == {"FAILED"}


def test_a_full_disk_stops_the_record_and_not_the_stage(
    paths: Paths, params: Params, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with tracked_run(Stage("sft"), params, paths) as log:
        monkeypatch.setattr(spool.Journal, "write", refuse)
        log({"loss": 1.0}, 0)
        log({"loss": 1.0}, 1)
        reached = True
    assert reached
    assert sum("takes no more" in record.message for record in caplog.records) == 1


def test_a_killed_stage_leaves_no_process_behind(paths: Paths) -> None:
    script = (
        "import os, sys, signal; from pathlib import Path; from rlhf.params_file import load_params;"
        "from tasks.paths import Paths; from tasks.tracking import Stage, tracked_run;"
        "root, params = map(Path, sys.argv[1:]);\n"
        "with tracked_run(Stage('sft'), load_params(params), Paths(root)):\n"
        "    children = Path(f'/proc/self/task/{os.getpid()}/children').read_text(); print(children, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, str(paths.root), str(ROOT / "params.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    (sender,) = done.stdout.split()
    descriptor = os.pidfd_open(int(sender)) if Path(f"/proc/{sender}").exists() else None
    if descriptor is not None:
        import select

        assert select.select([descriptor], [], [], 60)[0], "the sender outlives its stage"
    shipping.ship_pending(paths)
    _, runs = _runs(paths)
    assert runs["sft"].info.status == "KILLED"


def test_first_users_of_a_store_wait_for_each_other(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tasks.paths import Paths; from tasks.tracking import ensure_store;"
        "ensure_store(Paths(Path(sys.argv[1])))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    outcomes = [(process.communicate()[1], process.returncode) for process in started]
    assert [status for _, status in outcomes] == [0, 0, 0], outcomes


def test_hashes_are_those_of_dvc(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    for name in ("b.txt", "b/c.txt", "a.txt", "ä.txt"):
        (folder / name).write_text(name)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=tmp_path, check=True)
    (out,) = YAML(typ="safe").load((tmp_path / "data.dvc").read_text())["outs"]
    assert lineage.hash_path(folder) == out["md5"]


def test_a_policy_reads_its_own_files(paths: Paths) -> None:
    assert lineage.stage_files(paths.root, Stage("policy", "dpo")) == (
        ["models/sft", "data/validated/prompts/train.jsonl"],
        ["models/policy/dpo", "metrics/policy/dpo.json"],
    )
    assert lineage.stage_files(paths.root, Stage("nothing")) == ([], [])


def test_groups(paths: Paths, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lineage.run_group(paths.root, params).key == f"repro-nogit-{lineage.params_hash(params)}"
    monkeypatch.setenv("DVC_EXP_NAME", "wise-crow")
    assert lineage.run_group(paths.root, params).name == "wise-crow"
    monkeypatch.setenv(lineage.PARENT_KEY, "flow-1")
    assert lineage.run_group(paths.root, params).key == "flow-1"


@pytest.mark.parametrize(
    ("name", "clean"), [("rewards/f@k", "rewards/f_k"), ("/a//b/", "a/b"), ("kl.mean", "kl.mean"), ("λ", "_")]
)
def test_metric_names(name: str, clean: str) -> None:
    assert metric_name(name) == clean


def test_tracking_uri(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.tracking_uri(paths) == f"sqlite:///{paths.root / 'mlruns/mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert store.tracking_uri(paths) == "http://tracker:5000"
    monkeypatch.chdir(paths.root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    assert store.tracking_uri(paths) == f"sqlite:///{paths.root / 'here.db'}"
