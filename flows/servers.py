"""MLflow's and Prefect's servers on this machine: opened for a person, or beneath a schedule."""

from __future__ import annotations

import os
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from rlhf.errors import UserError
from tasks.paths import Paths
from tasks.processes import Process, StoppedError, run_process, start_keeper, stop_processes

HOST = "127.0.0.1"
_ENDLESS = float("inf")


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
    """MLflow over the workspace's own store, which it makes where there is none."""
    paths.mlruns.mkdir(exist_ok=True)
    store = paths.mlruns.resolve()
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{store / 'mlflow.db'}", "--default-artifact-root", str(store / "artifacts")]
    return Server("MLflow", port, command, "/health")


def prefect_server(port: int) -> Server:
    """Prefect's server with its scheduler, over the database of the user's profile."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return Server("Prefect", port, command, "/api/health")


def open_servers(servers: list[Server]) -> int:
    """Run them until Ctrl-C or until one ends, say when they are up, and end all together; the exit status.

    Raises UserError where a port is taken, before any of them starts.
    """
    for server in servers:
        check_port(server)
    start_keeper()
    with ThreadPoolExecutor(len(servers)) as pool:
        running = {pool.submit(run_server, server, print): server for server in servers}
        try:
            for server in servers:
                if wait_until_up(server, running):
                    print(f"{server.name:8s}{server.address}", flush=True)
            print("Ctrl-C ends both", flush=True)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
        finally:
            stop_processes()
    first = next(iter(done))
    print(f"{running[first].name} ended by itself; its last words are above", file=sys.stderr)
    return 1


def check_port(server: Server) -> None:
    """Raise UserError where something listens on the server's port already."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            probe.bind((HOST, server.port))
        except (OSError, OverflowError) as error:
            name = server.name.upper()
            raise UserError(
                f"port {server.port} for {server.name} cannot be used ({getattr(error, 'strerror', None) or error}); "
                f"end what uses it or choose another: make ui {name}_PORT={server.port + 1}"
            ) from None


def run_server(server: Server, say: Callable[[str], None]) -> int:
    """Run a server until it ends or the flow's processes are stopped; hands over what it prints only if it fails."""
    lines: list[str] = []
    environment = os.environ | {"PREFECT_API_URL": "", "PREFECT_SERVER_LOGGING_LEVEL": "WARNING", "PYTHONUNBUFFERED": "1"}
    process = Process(server.command, Paths.__module__ and _folder(), environment, _ENDLESS)
    try:
        status = run_process(process, lambda line: lines.append(line))
    except StoppedError:
        return 0
    for line in lines[-20:]:
        say(f"{server.name} | {line}")
    return status
