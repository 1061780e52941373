"""MLflow's record of every execution: the only package that imports mlflow, and never on a training's path."""

from tasks.tracking.lineage import Group, Stage
from tasks.tracking.recording import tracked_run
from tasks.tracking.store import EXPERIMENT, ensure_store, tracking_uri

__all__ = ["EXPERIMENT", "Group", "Stage", "ensure_store", "tracked_run", "tracking_uri"]
