"""MLflow's and Prefect's servers on this machine: opened for a person, or beneath a schedule."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.request
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from rlhf.errors import UserError
from tasks.paths import EXPERIMENT, Paths
from tasks.processes import Process, StoppedError, run_process, start_keeper, stop_processes

HOST = "127.0.0.1"
_PATIENCE_SECONDS = 180.0
_POLL_SECONDS = 0.3
_PAUSE_SECONDS = 5.0


@dataclass(frozen=True)
class Server:
    """A server's name, its port, the command that starts it and the page that answers when it is up."""

    name: str
    port: int
    command: list[str]
    health: str

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"


def mlflow_server(paths: Paths, port: int) -> Server:
    """MLflow over the store that the workspace's runs go to, unless that is a server already."""
    store = paths.mlruns.resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store / 'mlflow.db'}"
    store.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri, "--default-artifact-root", str(store / "artifacts")]
    return Server("MLflow", port, command, "/health")


def prefect_server(port: int) -> Server:
    """Prefect's server with its scheduler, over the database of the user's profile."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return Server("Prefect", port, command, "/api/health")


def open_interfaces(paths: Paths, mlflow_port: int, prefect_port: int) -> int:
    """Serve MLflow and Prefect until Ctrl-C; of what runs elsewhere, or here already, print the address alone.

    Returns the exit status. Raises UserError where a port is taken, before anything starts.
    """
    elsewhere = {"MLflow": os.environ.get("MLFLOW_TRACKING_URI", ""), "Prefect": os.environ.get("PREFECT_API_URL", "")}
    wanted: list[Server] = []
    for server in (mlflow_server(paths, mlflow_port), prefect_server(prefect_port)):
        if elsewhere[server.name].startswith("http"):
            print(f"{server.name:8s}{elsewhere[server.name]} (from the environment)")
        elif server.name == "Prefect" and answers(server):  # as beneath a schedule; MLflow's may be another workspace's
            print(f"{server.name:8s}{server.address} (running already)")
        else:
            wanted.append(server)
    return serve(wanted, paths.root) if wanted else 0


def serve(servers: list[Server], folder: Path) -> int:
    """Run them until Ctrl-C or until one ends; then end all. Raises UserError where a port is taken."""
    for server in servers:
        check_port(server)
    start_keeper()
    with ThreadPoolExecutor(len(servers)) as pool:
        running = {pool.submit(run_server, server, folder): server for server in servers}
        try:
            for future, server in running.items():
                if wait_until_up(server, future):
                    print(f"{server.name:8s}{start_page(server)}", flush=True)
            print("Ctrl-C ends them", flush=True)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
        finally:
            stop_processes()
    print(f"{running[done.pop()].name} has ended by itself", file=sys.stderr)
    return 1


def start_page(server: Server) -> str:
    """Where a person begins: in MLflow our runs, as its own front page is about agents; else the front page."""
    if server.name != "MLflow":
        return server.address
    question = f"{server.address}/api/2.0/mlflow/experiments/get-by-name?experiment_name={EXPERIMENT}"
    try:
        with urllib.request.urlopen(question, timeout=10) as answer:
            number = json.load(answer)["experiment"]["experiment_id"]
    except OSError:  # nothing has run yet
        return server.address
    return f"{server.address}/#/experiments/{number}?workflowType=machine_learning"


def check_port(server: Server) -> None:
    """Raise UserError where something listens on the server's port, or the port is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            probe.bind((HOST, server.port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"port {server.port} for {server.name} cannot be used ({reason.lower()}); end what uses it, or choose "
                f"another: make ui {server.name.upper()}_PORT={server.port + 10}"
            ) from None


def keep_server(server: Server, folder: Path) -> None:
    """Run the server whenever nothing listens on its port, also after it has ended by itself, until it is stopped."""
    while _is_taken(server) or run_server(server, folder):
        time.sleep(_PAUSE_SECONDS)


def _is_taken(server: Server) -> bool:
    try:
        check_port(server)
    except UserError:
        return True
    return False


def check_api() -> None:
    """Raise UserError where Prefect is told of a server, as by PREFECT_API_URL, that does not answer."""
    if address := PREFECT_API_URL.value():
        with get_client(sync_client=True) as client:
            if reason := client.api_healthcheck():
                raise UserError(
                    f"Prefect's server at {address} does not answer ({reason}); start it, or unset PREFECT_API_URL to "
                    "have one on this machine"
                )


def run_server(server: Server, folder: Path) -> bool:
    """Run a server until it ends by itself (true), when its last lines are shown, or is stopped."""
    lines: list[str] = []
    environment = os.environ | {"PREFECT_API_URL": "", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONUNBUFFERED": "1"}
    try:
        run_process(Process(server.command, folder, environment, float("inf")), lines.append)
    except StoppedError:
        return False
    for line in lines[-20:]:
        print(f"{server.name} | {line}", file=sys.stderr)
    return True


def wait_until_up(server: Server, running: Future[bool] | None = None) -> bool:
    """Whether the server answers before it ends and before our patience does."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline and not (running and running.done()):
        if answers(server):
            return True
        time.sleep(_POLL_SECONDS)
    return False


def answers(server: Server) -> bool:
    """Whether the server's health page can be read."""
    try:
        with urllib.request.urlopen(server.address + server.health, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
