"""The model registry: versions that point at logged models, each with its lineage, and the alias `champion`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import UserError
from rlhf.params import Params
from tasks.paths import Paths
from tasks.tracking.lineage import run_group
from tasks.tracking.models import HASH_TAG, find_model, log_model
from tasks.tracking.shipping import describe, ship_pending
from tasks.tracking.store import connect, parent_run, settle_parent, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
_CROWNED = "alignflow.crowned"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """A registered version and its tags."""

    number: str
    tags: Mapping[str, str]

    @property
    def md5(self) -> str | None:
        return self.tags.get(HASH_TAG)

    @property
    def was_crowned(self) -> bool:
        """Whether it is or was the champion; a promotion that died halfway leaves a version that never was."""
        return _CROWNED in self.tags


@dataclass(frozen=True)
class Registry:
    """An open registry; every method raises what MLflow raises where it does not answer."""

    client: MlflowClient
    experiment_id: str
    paths: Paths
    params: Params

    def champion(self, name: str) -> Version | None:
        """The version with the alias `champion`."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version_by_alias(name, CHAMPION)
        except MlflowException as error:
            if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                return None  # no such model yet, or no such alias
            raise
        return Version(str(found.version), found.tags)

    def version_of(self, name: str, md5: str) -> Version | None:
        """The version that holds the model with this hash."""
        found = self.client.search_model_versions(f"name = '{name}' and tags.`{HASH_TAG}` = '{md5}'")
        return Version(str(found[0].version), found[0].tags) if found else None

    def register(self, name: str, folder: Path, md5: str, tags: Mapping[str, str]) -> Version:
        """Make a version of the model that a run has logged; a model without a run is logged by one of ours."""
        from mlflow.exceptions import MlflowException

        logged = find_model(self.client, self.experiment_id, md5)
        model_id = logged.model_id if logged else self._log(folder, md5)
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self.client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=logged.source_run_id if logged else None,
            tags={**tags, HASH_TAG: md5},
            model_id=model_id,
        )
        return Version(str(made.version), made.tags)

    def crown(self, name: str, version: Version) -> None:
        """Give a version the alias, taking it from the one before."""
        self.client.set_registered_model_alias(name, CHAMPION, version.number)
        self.client.set_model_version_tag(name, version.number, _CROWNED, "true")

    def _log(self, folder: Path, md5: str) -> str:
        """DVC may have restored the model from its cache, which runs nothing and so leaves no run."""
        group = run_group(self.paths.root, self.params)
        parent = parent_run(self.client, self.experiment_id, self.paths, group)
        tags = {"mlflow.parentRunId": parent, "alignflow.stage": "promote", "alignflow.kind": "stage"}
        run_id = self.client.create_run(self.experiment_id, run_name="promote", tags=tags).info.run_id
        model_id = log_model(self.client, run_id, folder, md5)
        self.client.set_terminated(run_id, "FINISHED")
        settle_parent(self.client, self.experiment_id, parent)
        return model_id


def open_registry(paths: Paths, params: Params) -> Registry:
    """Connect, and first send what waits, so that the models to register are there.

    Raises UserError where MLflow does not answer: a registry cannot be written to later.
    """
    try:
        client, experiment_id = connect(tracking_uri(paths), paths)
        ship_pending(paths)
    except Exception as error:
        raise unreachable(paths, error) from error
    return Registry(client, experiment_id, paths, params)


def unreachable(paths: Paths, error: Exception) -> UserError:
    """What to tell where the registry does not answer."""
    return UserError(
        f"the model registry at {tracking_uri(paths)} does not answer ({describe(error)}); "
        "start it, or set MLFLOW_TRACKING_URI, and run promote again"
    )
