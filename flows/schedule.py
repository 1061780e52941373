"""The alignment flow on a schedule: never two runs at once, and where nothing has changed nothing runs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from zoneinfo import ZoneInfo

import httpx
from prefect.client.orchestration import get_client
from prefect.schedules import Cron, Schedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.alignment import align
from flows.ownership import check_schedule, end_lost_runs, workspace_tag
from flows.servers import answers, check_api, check_port, keep_server, prefect_server, wait_until_up
from rlhf.errors import UserError
from rlhf.params_file import load_params
from tasks.paths import Paths, find_root
from tasks.processes import start_keeper, stop_processes
from tasks.stage import BusyError, check_workspace, open_workspace

NAME = "scheduled"
PAUSE_SECONDS = 10.0
"""Between two questions to a server that does not answer."""


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C; the exit status is 0, or 1 (explained on stderr)."""
    options = make_parser().parse_args(arguments)
    try:
        serve(read_cron(options.cron, options.timezone), options.parallel, options.port, options.name)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def serve(schedule: Schedule, parallel: int | None = None, port: int = 4200, name: str = NAME) -> None:
    """Run the flow by the schedule, in this workspace, until Ctrl-C.

    Without PREFECT_API_URL it uses the server on `port`, or starts one: Prefect's temporary servers keep
    no schedules. Never two at once: by `limit`, which this process keeps, and by the workspace's lock; a limit on
    the server would be held for ever by a run whose process was killed. Raises UserError where the workspace or
    its params are unfit, or another workspace serves a schedule of that name.
    """
    paths = Paths(find_root())
    check_workspace(paths.root)
    load_params(paths.params)
    os.chdir(paths.root)
    start_keeper()
    with temporary_settings({PREFECT_API_URL: PREFECT_API_URL.value() or _local_server(port, paths)}):
        check_api()
        check_schedule(paths, f"{align.name}/{name}")
        with suppress(BusyError), open_workspace(paths.root):
            end_lost_runs(paths)
        tags = [workspace_tag(paths)]
        try:
            _outlast_outages(
                lambda: align.serve(name, schedule=schedule, parameters={"parallel": parallel}, tags=tags, limit=1)
            )
        finally:
            stop_processes()


def _outlast_outages(serve: Callable[[], None]) -> None:
    """Prefect's runner gives up after some minutes without its server; serve anew once that answers again."""
    while True:
        try:
            return serve()
        except (httpx.HTTPError, RuntimeError, ExceptionGroup) as error:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what the runner would do needs the server
            print(f"Prefect's runner gave up ({error}); it begins anew when its server answers", file=sys.stderr)
        with get_client(sync_client=True) as client:
            time.sleep(PAUSE_SECONDS)
            while client.api_healthcheck():
                time.sleep(PAUSE_SECONDS)


def read_cron(cron: str, timezone: str) -> Schedule:
    """A schedule from a cron line and the place whose clock it means. Raises UserError where it is none."""
    try:
        ZoneInfo(timezone)
        return Cron(cron, timezone=timezone)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"--cron {cron!r} with --timezone {timezone!r} is no schedule ({error}); write five fields and the name of "
            'a place, as in --cron "0 2 * * *" --timezone Europe/London'
        ) from None


def _local_server(port: int, paths: Paths) -> str:
    """The API's address of the server on `port`, which is started in the background whenever there is none."""
    server = prefect_server(port)
    there = answers(server)
    if not there:
        check_port(server)
    threading.Thread(target=keep_server, args=(server, paths.root), daemon=True).start()
    if not there:
        if not wait_until_up(server):
            raise UserError(
                f"Prefect's server did not answer at {server.address}; start it with `make ui` and try again"
            )
        print(f"Prefect {server.address}")
    return f"{server.address}/api"


def make_parser() -> argparse.ArgumentParser:
    """The options of a schedule; `alignflow schedule` has the same."""
    parser = argparse.ArgumentParser(prog="python -m flows.schedule", description=__doc__)
    parser.add_argument("--cron", required=True, help='when to run, as "0 2 * * *" (every night at two)')
    parser.add_argument("--timezone", default="UTC", help="of the cron line (default: UTC)")
    parser.add_argument("--parallel", type=int, help="policies trained at a time")
    parser.add_argument("--port", type=int, default=4200, help="of Prefect's server, where PREFECT_API_URL is not set")
    parser.add_argument("--name", default=NAME, help="of the schedule on Prefect's server (default: scheduled)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
