"""Which flow runs and schedules in Prefect are this workspace's, and which of its runs have lost their process."""

from __future__ import annotations

from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import DeploymentStatus, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from rlhf.errors import UserError
from tasks.paths import Paths

LOST = "its process was killed; what was complete stays, and the next run goes on with the stage that was at work"
_AT_WORK = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def workspace_tag(paths: Paths) -> str:
    """The tag of the workspace's flow runs: its folder's name, and what tells it from other clones and copies."""
    path = paths.state / "workspace"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(uuid4()), encoding="utf-8")
    identity = uuid5(NAMESPACE_URL, f"{path.read_text(encoding='utf-8', errors='replace')} {paths.root}")
    return f"{paths.root.name}-{identity.hex[:8]}"


def end_lost_runs(paths: Paths, own: UUID | None = None) -> None:
    """Mark as crashed the runs of this workspace that Prefect takes for running; the `own` one is tagged as such.

    To be called by who holds the workspace: nothing else can be at work in it. After a power cut, or where the memory
    was not enough, nobody else is left to tell Prefect.
    """
    tag = workspace_tag(paths)
    mine = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[tag]), state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_AT_WORK))
    )
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=mine):
            if run.id != own:
                client.set_flow_run_state(run.id, Crashed(message=LOST))
        if own:
            client.update_flow_run(own, tags=sorted({*client.read_flow_run(own).tags, tag}))


def check_schedule(paths: Paths, name: str) -> None:
    """Raise UserError where another workspace serves a schedule of this name, as each would get the other's runs."""
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(name)
        except ObjectNotFound:
            return
    if deployment.status == DeploymentStatus.READY and workspace_tag(paths) not in deployment.tags:
        owner = ", ".join(deployment.tags) or "another workspace"
        raise UserError(
            f"the schedule {name} on Prefect's server is being served by {owner}; end that one, or give this one a "
            "name of its own: --name nights"
        )
