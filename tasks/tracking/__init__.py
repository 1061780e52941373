"""MLflow's record of every execution: the only package that imports mlflow, and never on a training's path."""

from tasks.tracking.lineage import Group, Stage, flow_environment
from tasks.tracking.recording import tracked_run
from tasks.tracking.store import ensure_store, tracking_uri

__all__ = ["Group", "Stage", "ensure_store", "flow_environment", "tracked_run", "tracking_uri"]
