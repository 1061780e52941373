"""The flow around stages of a few lines each: branches, order, retries, locks, signals, ports, schedules."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import httpx
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Pending, Running, Scheduled, State
from prefect.testing.utilities import prefect_test_harness
from typer.testing import CliRunner

import alignflow
from flows import alignment, ownership, results, schedule, servers
from rlhf.errors import UserError
from tasks import processes
from tasks.paths import Paths
from tests.tiny import ROOT, change_params

POLICIES = ("ppo", "dpo", "grpo")
PATIENCE_MS = 120_000
AT_WORK = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
STAGE = '''
"""Stands for every stage: writes its output, or does what the file named after it says."""
import json, os, pathlib, signal, sys

name = "@".join(sys.argv[1:])
with open("ran", "a") as ran:
    ran.write(name + "\\n")
order = pathlib.Path("order-" + name)
what = order.read_text() if order.exists() else ""
if what.startswith("wait"):
    pathlib.Path("pid").write_text(f"{os.getpid()} {os.environ['ALIGNFLOW_PARENT_NAME']}")
    with open("ready", "w") as ready:
        ready.write("ready")
    signal.pause()
elif what.startswith("break once"):
    order.unlink()
    if what.endswith("143"):
        sys.exit(143)
    sys.exit("ValueError in rlhf/x.py line 1 (f): odd; run again with --debug for the traceback")
elif what:
    print("INFO rlhf.x: at work", file=sys.stderr)
    sys.exit(what)
if name == "promote":
    print("alignflow-policy: dpo is version 1, the first champion")
elif name == "evaluate":
    pathlib.Path("metrics").mkdir(exist_ok=True)
    figures = {"gold_reward": 0.5, "win_rate": 0.6, "win_rate_low": 0.55, "win_rate_high": 0.65}
    import json
    policies = {"sft": figures, "dpo": figures | {"gold_reward": 0.7}}
    pathlib.Path("metrics/evaluate.json").write_text(json.dumps(policies))
else:
    pathlib.Path("out").mkdir(exist_ok=True)
    pathlib.Path("out/" + name).write_text(pathlib.Path("seed").read_text())
'''
PIPELINE = """
stages:
  prepare: {cmd: python -m tasks prepare, deps: [seed], outs: [out/prepare]}
  validate: {cmd: python -m tasks validate, deps: [out/prepare], outs: [out/validate]}
  sft: {cmd: python -m tasks sft, deps: [out/validate], outs: [out/sft]}
  embed: {cmd: python -m tasks embed, deps: [out/sft], outs: [out/embed]}
  reward: {cmd: python -m tasks reward, deps: [out/embed], outs: [out/reward]}
  probe: {cmd: python -m tasks probe, deps: [out/reward], outs: [out/probe]}
  policy:
    foreach: ${policies}
    do:
      cmd: python -m tasks policy ${key}
      deps: [out/probe]
      params: ['policies.${key}']
      outs: ['out/policy@${key}']
  evaluate:
    cmd: python -m tasks evaluate
    deps: [out/policy@ppo, out/policy@dpo, out/policy@grpo]
    metrics: [metrics/evaluate.json: {cache: false}]
"""


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """A Prefect server with an empty database, for flows in this process and in others."""
    with prefect_test_harness(server_startup_timeout=180):
        yield str(PREFECT_API_URL.value())


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with a pipeline of the real shape and stages of no weight."""
    root = tmp_path / "workspace"
    (root / "tasks").mkdir(parents=True)
    (root / "tasks" / "__init__.py").touch()
    (root / "tasks" / "__main__.py").write_text(STAGE, encoding="utf-8")
    (root / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (root / "seed").write_text("1", encoding="utf-8")
    (root / ".gitignore").write_text("/out\n/.alignflow\n__pycache__\n", encoding="utf-8")
    shutil.copy(ROOT / "params.yaml", root)
    (root / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", root / ".dvc")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.chdir(Path.cwd())  # a schedule changes to its workspace; afterwards the tests are back
    return root


def _ran(root: Path) -> list[str]:
    """The stages whose command was run since the last time we asked."""
    path = root / "ran"
    names = path.read_text(encoding="utf-8").split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def _task_runs(flow_message: str) -> dict[str, str]:
    """The state's name of every task run of the flow run whose message is given."""
    with get_client(sync_client=True) as client:
        flows = [run for run in client.read_flow_runs() if run.state and run.state.message == flow_message]
        assert len(flows) == 1
        return {
            run.name: run.state.name for run in client.read_task_runs() if run.flow_run_id == flows[0].id and run.state
        }


def test_a_second_run_does_nothing_and_says_so(
    prefect_api: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert alignment.main(["--parallel", "2"]) == 0
    ran = _ran(workspace)
    assert ran[:6] == ["prepare", "validate", "sft", "embed", "reward", "probe"]
    assert sorted(ran[6:9]) == sorted(f"policy@{name}" for name in POLICIES)
    assert ran[9:] == ["evaluate", "promote"]
    shown = capsys.readouterr().out
    assert shown.index("│ dpo") < shown.index("│ sft")  # the best first
    assert "0.600 (0.550–0.650)" in shown  # however narrow the terminal
    assert "reports/evaluate/report.html" in shown
    assert "make ui" in shown

    assert alignment.main([]) == 0
    assert _ran(workspace) == ["promote"]


def test_only_the_descendants_of_a_change_run(prefect_api: str, workspace: Path) -> None:
    assert alignment.main([]) == 0
    _ran(workspace)
    change_params(workspace / "params.yaml", lambda params: params["policies"]["dpo"].update(beta=0.3))
    assert alignment.main([]) == 0
    assert _ran(workspace) == ["policy@dpo", "promote"]  # it wrote the same bytes, so DVC leaves the evaluation
    (workspace / "seed").write_text("2", encoding="utf-8")
    assert alignment.main([]) == 0
    assert set(_ran(workspace)) == {"prepare", "validate", "sft", "embed", "reward", "probe", "evaluate", "promote"} | {
        f"policy@{name}" for name in POLICIES
    }


def test_a_stage_also_runs_for_what_changed_two_stages_before_it(prefect_api: str, workspace: Path) -> None:
    """embed reads what validate wrote, and comes after sft, which has nothing to do."""
    pipeline = PIPELINE.replace("sft, deps: [out/validate]", "sft, deps: [params.yaml]")
    pipeline = pipeline.replace("embed, deps: [out/sft]", "embed, deps: [out/sft, out/validate]")
    (workspace / "dvc.yaml").write_text(pipeline, encoding="utf-8")
    assert alignment.main([]) == 0
    _ran(workspace)
    (workspace / "seed").write_text("2", encoding="utf-8")
    assert alignment.main([]) == 0
    assert _ran(workspace)[:4] == ["prepare", "validate", "embed", "reward"]


def test_a_failing_policy_leaves_the_others_complete(
    prefect_api: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "order-policy@dpo").write_text("policies.dpo.beta is 9; lower it", encoding="utf-8")
    assert alignment.main(["--parallel", "3"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("policy@dpo failed: policies.dpo.beta is 9; lower it; complete: ")
    assert "policy@ppo, policy@grpo" in message
    assert message.endswith("evaluate, promote")
    states = _task_runs(message)
    assert states["policy@dpo"] == "Refused"
    assert states["policy@ppo"] == states["policy@grpo"] == "Completed"
    assert states["evaluate"] == states["promote"] == "Skipped"
    assert _ran(workspace).count("policy@dpo") == 1  # refused: a second try would be in vain

    (workspace / "order-policy@dpo").unlink()
    assert alignment.main([]) == 0
    assert _ran(workspace) == ["policy@dpo", "evaluate", "promote"]


def test_bad_data_stops_everything_behind_it(
    prefect_api: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "order-validate").write_text("9 of 10 rows are broken", encoding="utf-8")
    assert alignment.main([]) == 1
    assert _ran(workspace) == ["prepare", "validate"]
    assert "validate failed: 9 of 10 rows are broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "order", "tries"), [("sft", "break once", 2), ("sft", "break once 143", 2), ("validate", "break once", 1)]
)
def test_a_stage_that_breaks_down_is_tried_again_but_data_are_not(
    prefect_api: str, workspace: Path, stage: str, order: str, tries: int, caplog: pytest.LogCaptureFixture
) -> None:
    (workspace / f"order-{stage}").write_text(order, encoding="utf-8")
    assert alignment.main([]) == (0 if tries == 2 else 1)
    assert _ran(workspace).count(stage) == tries
    assert ("killed by signal 15" in caplog.text) == order.endswith("143")


@pytest.mark.usefixtures("prefect_api")
def test_a_schedule_becomes_runs() -> None:
    every_night = schedule.read_cron("0 2 * * *", "Europe/Berlin")
    deployment = alignment.align.to_deployment("scheduled", schedule=every_night).apply()
    with get_client(sync_client=True) as client:  # asks again where the server's own scheduler holds SQLite
        client.request("POST", f"/deployments/{deployment}/schedule", json={"max_runs": 3}).raise_for_status()
        times = [run.expected_start_time for run in client.read_flow_runs() if run.deployment_id == deployment]
    assert len(times) >= 3
    assert {time.astimezone(ZoneInfo("Europe/Berlin")).hour for time in times if time} == {2}


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def test_only_what_this_workspace_has_lost_is_marked_as_crashed(client: SyncPrefectClient, workspace: Path) -> None:
    tag = ownership.workspace_tag(Paths(workspace))

    def run(tag: str, state: State[Any]) -> UUID:
        return client.create_flow_run(alignment.align, parameters={}, tags=[tag, "mine"], state=state).id

    lost = [run(tag, Running()), run(tag, Pending())]
    others = [run(f"{workspace.name}-0", Running()), run(tag, Scheduled())]
    own = run("", Running())
    ownership.end_lost_runs(Paths(workspace), own)
    states = {one: client.read_flow_run(one).state for one in (*lost, *others, own)}
    assert all(state and state.is_crashed() and state.message == ownership.LOST for state in map(states.get, lost))
    assert not any(state and state.is_final() for state in map(states.get, (*others, own)))
    assert set(client.read_flow_run(own).tags) >= {tag, "mine"}
    for one in (*others, own):
        client.delete_flow_run(one)


def test_a_copied_workspace_has_a_tag_of_its_own(workspace: Path) -> None:
    tag = ownership.workspace_tag(Paths(workspace))
    copy = shutil.copytree(workspace, workspace.parent / "copies" / workspace.name)
    assert ownership.workspace_tag(Paths(workspace)) == tag
    assert ownership.workspace_tag(Paths(copy)) != tag
    (workspace / ".alignflow" / "workspace").write_bytes(b"\xff")  # as after a power cut
    assert re.fullmatch(f"{workspace.name}-[0-9a-f]{{8}}", ownership.workspace_tag(Paths(workspace)))


def test_a_schedule_that_another_workspace_serves_is_not_taken_over(
    client: SyncPrefectClient, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = alignment.align.to_deployment("nightly", tags=["other-1"]).apply()
    ownership.check_schedule(Paths(workspace), "alignment/nightly")  # nobody serves it
    client.get_scheduled_flow_runs_for_deployments([deployment])  # as who serves it does
    assert schedule.main(["--cron", "0 2 * * *", "--name", "nightly"]) == 1
    message = "the schedule alignment/nightly on Prefect's server is being served by other-1; .*--name nights\n"
    assert re.fullmatch(message, capsys.readouterr().err)


def test_artifacts_hold_results_and_links(prefect_api: str, workspace: Path) -> None:
    assert alignment.main([]) == 0
    with get_client(sync_client=True) as client:
        newest: dict[str, Any] = {}
        for artifact in client.read_artifacts():
            if artifact.key and (artifact.key not in newest or artifact.created > newest[artifact.key].created):
                newest[artifact.key] = artifact
    page = newest["alignment-results"].data
    assert "| prepare | Completed |" in page
    assert "alignflow-policy: dpo is version 1, the first champion" in page
    assert "reports/evaluate/report.html" in page
    assert [row["policy"] for row in json.loads(newest["alignment-policies"].data)] == ["dpo", "sft"]
    assert newest["alignment-progress"].data == 100.0


def test_what_prefect_would_only_show_fails_no_stage(
    prefect_api: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise httpx.ConnectError("connection refused")

    monkeypatch.setattr(results, "update_progress_artifact", refuse)
    monkeypatch.setattr(results, "create_markdown_artifact", refuse)
    assert alignment.main([]) == 0
    assert _ran(workspace)[-1] == "promote"
    for what in ("the run's progress", "the table of results"):
        assert f"Prefect's server did not take {what} (connection refused); the run goes on" in caplog.text


def test_a_schedule_outlasts_its_server(
    prefect_api: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = iter([RuntimeError("Service exceeded error threshold."), ExceptionGroup("errors", [OSError()]), None])

    def serve(*_: object, **__: object) -> None:
        if error := next(ends):
            raise error

    monkeypatch.setattr(alignment.align, "serve", serve)
    monkeypatch.setattr(schedule, "PAUSE_SECONDS", 0.0)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert schedule.main(["--cron", "0 2 * * *"]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert next(ends, "all taken") == "all taken"
    assert capsys.readouterr().err.count("it begins anew when its server answers") == 2


@pytest.mark.parametrize("command", [alignment.main, lambda _: schedule.main(["--cron", "0 2 * * *"])])
def test_a_server_that_does_not_answer_is_named(
    command: Callable[[list[str]], int], workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"http://{servers.HOST}:{_free_port()}/api"
    with temporary_settings({PREFECT_API_URL: address, PREFECT_CLIENT_MAX_RETRIES: 0}):
        assert command([]) == 1
    assert f"Prefect's server at {address} does not answer (" in capsys.readouterr().err


# What ends before Prefect is asked ----------------------------------------------------------------


@pytest.fixture
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow must not begin."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the flow began")

    monkeypatch.setattr(alignment, "align", fail)


@pytest.mark.usefixtures("no_prefect")
def test_a_second_flow_in_the_workspace_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / ".alignflow").mkdir()
    with (workspace / ".alignflow" / "flow.lock").open("w", encoding="utf-8") as held:
        held.write("4711")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        assert alignment.main([]) == 1
    error = capsys.readouterr().err
    assert "another flow (process 4711) is at work in" in error
    assert "Traceback" not in error


@pytest.mark.usefixtures("no_prefect")
def test_no_git_repository_is_said_in_a_sentence(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(workspace / ".git")
    assert alignment.main([]) == 1
    error = capsys.readouterr().err.strip()
    assert "is in no git repository" in error
    assert "git init" in error
    assert "\n" not in error


@pytest.mark.usefixtures("no_prefect")
def test_bad_params_are_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_params(workspace / "params.yaml", lambda params: params["sft"].update(learning_rate=-1.0))
    assert alignment.main([]) == 1
    assert "sft.learning_rate is -1.0" in capsys.readouterr().err


def test_a_pipeline_that_dvc_cannot_read_is_refused_with_its_reason(workspace: Path) -> None:
    from tasks.workspace import Workspace, find_stale

    (workspace / "dvc.yaml").write_text("stages: {prepare: {cmmd: x}}", encoding="utf-8")
    with pytest.raises(UserError, match="DVC cannot tell which stages are stale: .*dvc.yaml"):
        find_stale(Workspace(Paths(workspace)))


@pytest.mark.parametrize("cron", ["bad", "61 2 * * *", "0 2 * *"])
def test_a_bad_cron_line_is_refused(cron: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule.main(["--cron", cron]) == 1
    assert f"--cron {cron!r}" in capsys.readouterr().err


def test_both_commands_of_a_schedule_take_the_same_options() -> None:
    helps = [schedule.make_parser().format_help(), CliRunner().invoke(alignflow.app, ["schedule", "--help"]).output]
    known, taken = (set(re.findall(r"--\w+", text)) for text in helps)
    assert {"--cron", "--name"} < known == taken


def test_an_unknown_timezone_is_refused() -> None:
    with pytest.raises(UserError, match="Mars/Olympus"):
        schedule.read_cron("0 2 * * *", "Mars/Olympus")


def test_a_port_in_use_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(servers, "run_server", fail)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.socket() as taken:
        taken.bind((servers.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} for Prefect .*make ui PREFECT_PORT="):
            servers.open_interfaces(Paths(tmp_path), _free_port(), port)


def test_a_prefect_that_runs_already_is_not_started_again(
    prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    port = int(prefect_api.split(":")[-1].split("/")[0])
    assert servers.open_interfaces(Paths(tmp_path), _free_port(), port) == 0
    assert f"Prefect http://{servers.HOST}:{port} (running already)" in capsys.readouterr().out


@pytest.mark.parametrize("there", [True, False])
def test_mlflow_opens_at_our_runs_once_there_are_some(there: bool) -> None:
    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if there and "experiment_name=alignflow" in self.path else 404)
            self.end_headers()
            self.wfile.write(b'{"experiment": {"experiment_id": "7"}}')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((servers.HOST, 0), Store) as store:
        threading.Thread(target=store.serve_forever).start()
        page = servers.start_page(servers.Server("MLflow", store.server_port, [], "/health"))
        store.shutdown()
    assert page.endswith("/#/experiments/7?workflowType=machine_learning" if there else f":{store.server_port}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((servers.HOST, 0))
        return probe.getsockname()[1]


# Processes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _waiting_flow(workspace: Path, api: str) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A flow in a process of its own whose stage sft is at work, and that stage's process."""
    (workspace / "order-sft").write_text("wait", encoding="utf-8")
    os.mkfifo(workspace / "ready")
    ready = os.open(workspace / "ready", os.O_RDWR | os.O_NONBLOCK)
    environment = os.environ | {"DVC_ROOT": str(workspace), "PREFECT_API_URL": api}
    with (workspace / "log").open("wb") as log:
        flow = subprocess.Popen(
            [sys.executable, "-m", "flows.alignment"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        assert poll.poll(PATIENCE_MS), (workspace / "log").read_text(encoding="utf-8")
        yield flow, psutil.Process(int((workspace / "pid").read_text(encoding="utf-8").split()[0]))
    finally:
        os.close(ready)
        flow.kill()
        flow.wait()


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=lambda value: str(value),
)
def test_no_process_outlives_the_flow_and_the_next_run_goes_on(
    prefect_api: str, workspace: Path, number: signal.Signals, status: int
) -> None:
    with _waiting_flow(workspace, prefect_api) as (flow, stage):
        mark = stage.environ()[processes.MARK]
        family = [one for one in psutil.process_iter() if _carries(one, mark)]
        assert stage in family
        assert len(family) >= 2  # DVC and the stage, and a shell where there is one between them
        flow.send_signal(number)
        assert flow.wait(PATIENCE_MS / 1000) in (status, -int(number))
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_MS / 1000)
        assert not alive
    _ran(workspace)
    (workspace / "order-sft").unlink()
    assert alignment.main([]) == 0
    assert _ran(workspace)[0] == "sft"
    with get_client(sync_client=True) as client:
        runs = [run for run in client.read_flow_runs() if ownership.workspace_tag(Paths(workspace)) in run.tags]
    assert [run.name for run in runs if run.state_type in AT_WORK] == []
    assert len(runs) == 2


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(processes.MARK) == mark
    except psutil.Error:
        return False


@contextlib.contextmanager
def _serving(workspace: Path, api: str) -> Iterator[Callable[[str], None]]:
    """Serve the schedule in a process of its own, killed in the end with all it has started; wait for lines of it."""
    environment = os.environ | {"DVC_ROOT": str(workspace), "PREFECT_API_URL": api, "PYTHONUNBUFFERED": "1"}
    environment["PREFECT_RUNNER_POLL_FREQUENCY"] = "1"
    command = [sys.executable, "-m", "flows.schedule", "--cron", "0 2 * * *"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as server:
        alarm = threading.Timer(PATIENCE_MS / 1000, server.kill)
        alarm.start()

        def wait_for(line: str) -> None:
            assert server.stdout
            seen = list(itertools.takewhile(lambda printed: not re.search(line, printed), server.stdout))
            assert server.poll() is None, "".join(seen)

        try:
            wait_for("is being served")
            yield wait_for
        finally:
            alarm.cancel()
            for process in (psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)):
                process.kill()


def test_a_schedule_whose_run_was_killed_with_it_goes_on(
    prefect_api: str, client: SyncPrefectClient, workspace: Path
) -> None:
    def order_run() -> UUID:
        deployment = client.read_deployment_by_name("alignment/scheduled")
        return client.create_flow_run_from_deployment(deployment.id).id

    (workspace / "order-sft").write_text("wait", encoding="utf-8")
    with _serving(workspace, prefect_api) as wait_for:
        lost = order_run()
        wait_for("Beginning flow run")
    (workspace / "order-sft").unlink()
    with _serving(workspace, prefect_api) as wait_for:
        assert client.read_flow_run(lost).state_type == StateType.CRASHED
        again = order_run()
        wait_for(r"Flow run .* Finished in state Completed")
    assert client.read_flow_run(again).state_type == StateType.COMPLETED


def test_stages_know_the_flow_they_belong_to(prefect_api: str, workspace: Path) -> None:
    with _waiting_flow(workspace, prefect_api) as (flow, _stage):
        name = (workspace / "pid").read_text(encoding="utf-8").split()[1]
        with get_client(sync_client=True) as client:
            assert name in {run.name for run in client.read_flow_runs()}
        flow.send_signal(signal.SIGTERM)
        flow.wait(PATIENCE_MS / 1000)


def _process(tmp_path: Path, script: str, seconds: float = 60.0) -> processes.Process:
    return processes.Process([sys.executable, "-c", script], tmp_path, dict(os.environ), seconds)


@pytest.fixture
def fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes may start, and have little time to end."""
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    processes.start_keeper()


@pytest.mark.usefixtures("fresh_processes")
def test_lines_and_status_come_through(tmp_path: Path) -> None:
    lines: list[str] = []
    script = (
        "import sys; out = sys.stdout.buffer; out.write(b'one\\n\\ntwo\\n\\xff\\n'); out.flush();"
        "print('10%\\r20%', file=sys.stderr); sys.exit(3)"
    )
    assert processes.run_process(_process(tmp_path, script), lines.append) == 3
    assert lines == ["one", "two", "\ufffd", "10%", "20%"]


@pytest.mark.usefixtures("fresh_processes")
def test_a_process_that_takes_too_long_is_ended_with_its_children_even_if_it_will_not_hear(tmp_path: Path) -> None:
    script = (
        "import os, signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']);"
        "print(os.getpid(), child.pid, flush=True); signal.pause()"
    )
    lines: list[str] = []
    with pytest.raises(TimeoutError):
        processes.run_process(_process(tmp_path, script, seconds=2.0), lines.append)
    _assert_gone(lines)


def _assert_gone(lines: list[str]) -> None:
    named = [int(pid) for pid in lines[0].split()]
    alive = [psutil.Process(pid) for pid in named if psutil.pid_exists(pid)]
    assert not psutil.wait_procs([one for one in alive if one.status() != psutil.STATUS_ZOMBIE], timeout=10)[1]


@pytest.mark.usefixtures("fresh_processes")
def test_a_server_that_ended_by_itself_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_PAUSE_SECONDS", 0.0)
    os.mkfifo(tmp_path / "starts")
    command = [sys.executable, "-c", "open('starts', 'w').write('x')"]
    server = servers.Server("Prefect", _free_port(), command, "/api/health")
    keeper = threading.Thread(target=servers.keep_server, args=(server, tmp_path))
    starts = os.open(tmp_path / "starts", os.O_RDWR)
    keeper.start()
    try:
        for _ in range(3):
            assert select.select([starts], [], [], PATIENCE_MS / 1000)[0], "it was not started again"
            os.read(starts, 1)
    finally:
        processes.stop_processes()
        keeper.join(PATIENCE_MS / 1000)
        os.close(starts)
    assert not keeper.is_alive()


@pytest.mark.usefixtures("fresh_processes")
def test_an_interruption_ends_the_process_first(tmp_path: Path) -> None:
    lines: list[str] = []

    def interrupt(line: str) -> None:
        lines.append(line)
        raise KeyboardInterrupt

    script = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    with pytest.raises(KeyboardInterrupt):
        processes.run_process(_process(tmp_path, script), interrupt)
    _assert_gone(lines)


@pytest.mark.usefixtures("fresh_processes")
def test_after_a_stop_nothing_starts(tmp_path: Path) -> None:
    processes.stop_processes()
    with pytest.raises(processes.StoppedError):
        processes.run_process(_process(tmp_path, "open('started', 'w')"), print)
    assert not (tmp_path / "started").exists()


# Recipes ------------------------------------------------------------------------------------------


@pytest.fixture
def recipes(workspace: Path) -> Path:
    """A workspace under git with two recipes."""
    (workspace / "recipes").mkdir()
    for name, beta in (("soft", 0.05), ("hard", 0.5)):
        shutil.copy(ROOT / "params.yaml", workspace / "recipes" / f"{name}.yaml")
        change_params(workspace / "recipes" / f"{name}.yaml", _setter(beta))
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "add", "."], cwd=workspace, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "start"], cwd=workspace, check=True)
    return workspace


def _setter(beta: float) -> Callable[[dict[str, Any]], None]:
    return lambda params: params["policies"]["dpo"].update(beta=beta)


def test_a_recipe_replaces_committed_params_and_other_recipes(recipes: Path) -> None:
    from alignflow import apply_recipe

    for name in ("soft", "hard", "hard"):
        apply_recipe(recipes, name)
        assert (recipes / "params.yaml").read_bytes() == (recipes / "recipes" / f"{name}.yaml").read_bytes()


def test_a_recipe_does_not_overwrite_work(recipes: Path) -> None:
    from alignflow import apply_recipe

    change_params(recipes / "params.yaml", _setter(0.77))
    before = (recipes / "params.yaml").read_bytes()
    with pytest.raises(UserError, match="in no commit and no recipe"):
        apply_recipe(recipes, "soft")
    assert (recipes / "params.yaml").read_bytes() == before


def test_an_unknown_recipe_names_the_nearest(recipes: Path) -> None:
    from alignflow import apply_recipe

    with pytest.raises(UserError, match="no recipe 'sofd' .* did you mean soft"):
        apply_recipe(recipes, "sofd")
