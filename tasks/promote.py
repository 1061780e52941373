"""Decides whether the best policy becomes the registry's champion, and registers the reward model it was made with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rlhf.curves import Log
from rlhf.errors import UserError
from rlhf.params import Params
from tasks.paths import Paths
from tasks.tracking import lineage
from tasks.tracking.lineage import Stage
from tasks.tracking.registry import Registry, Version, open_registry, unreachable
from tasks.tracking.spool import locked

GOLD = "metric.gold_reward"
"""The tag by which a champion is compared."""
_NEEDED = ("gold_reward", "win_rate_low")


def run(params: Params, paths: Paths, log: Log) -> None:
    """Promote, and print the decision in one sentence per model."""
    with locked(paths.state / "promote.lock", wait=True):
        for sentence in promote(params, paths):
            print(sentence)


def promote(params: Params, paths: Paths) -> list[str]:
    """Register what deserves it and return what was decided.

    The best policy by gold reward, among those whose win rate's lower bound lies above the gate, is
    registered and crowned if its gold reward is above the champion's. A model that has a version, by
    its hash, is decided and left alone. Raises UserError where there is no evaluation, where a model
    is not the one that was evaluated, and where the registry does not answer.
    """
    figures = _read_figures(paths)
    gate = params.promote.min_win_rate_low
    passing = [name for name in sorted(figures) if name != "sft" and figures[name]["win_rate_low"] > gate]
    best = max(passing, key=lambda name: figures[name]["gold_reward"], default=None)
    models = ({"reward": Stage("reward")} if paths.reward_model else {}) | (
        {best: Stage("policy", best)} if best else {}
    )
    hashes = {name: _evaluated_hash(paths, stage) for name, stage in models.items()}
    registry = open_registry(paths, params)
    try:
        reward = _register_reward(registry, hashes["reward"]) if "reward" in hashes else None
        said = [reward[1]] if reward else []
        if best is None:
            return [_nobody(figures, gate), *said]
        policy, crowned = _promote_policy(registry, best, figures[best], hashes[best])
        if crowned and reward:
            registry.crown(params.promote.reward_name, reward[0])
        return [policy, *said]
    except UserError:
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] in {"mlflow", "requests", "sqlalchemy"}:
            raise unreachable(paths, error) from error
        raise


def _read_figures(paths: Paths) -> dict[str, dict[str, float]]:
    path = paths.metrics("evaluate")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, so nothing can be promoted; run the stage evaluate first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON; run the stage evaluate again") from None
    policies = {
        name: dict(values) for name, values in found.items() if isinstance(values, Mapping) and _NEEDED[0] in values
    }
    for name, values in policies.items():
        for key in _NEEDED if name != "sft" else ():
            if not isinstance(values.get(key), (int, float)) or not math.isfinite(values[key]):
                raise UserError(
                    f"{path}: {name}.{key} is {values.get(key)!r}, not a number; run the stage evaluate again"
                )
    return policies


def _evaluated_hash(paths: Paths, stage: Stage) -> str:
    """The model's hash; it must be the one dvc.lock has, where DVC ran the stage, as the figures are that model's."""
    folder = paths.model(stage.name, stage.item)
    name = folder.relative_to(paths.root).as_posix()
    if not folder.is_dir():
        raise UserError(f"{name} does not exist though it was evaluated; restore it with `dvc checkout {name}`")
    found = lineage.hash_path(folder)
    evaluated = lineage.locked_hashes(paths.root, Stage("evaluate")).get(name, found)
    if evaluated != found:
        raise UserError(
            f"{name} has the hash {found} but {evaluated} was evaluated (dvc.lock); run `dvc repro` before promoting"
        )
    return found


def _promote_policy(registry: Registry, name: str, figures: Mapping[str, float], md5: str) -> tuple[str, bool]:
    """The decision on a policy that passed the gate, and whether it is the new champion."""
    target, gold = registry.params.promote.policy_name, figures["gold_reward"]
    champion = registry.champion(target)
    if champion is not None and champion.md5 == md5:
        return f"{target}: {name} is the champion already (version {champion.number}); nothing to do", False
    present = float(champion.tags.get(GOLD, "-inf")) if champion else -math.inf
    if champion is not None and gold <= present:
        return (
            f"{target}: {name} (gold reward {gold:.4g}) does not beat the champion, version {champion.number} "
            f"({present:.4g}); the champion stays"
        ), False
    version = registry.version_of(target, md5)
    if version is not None and version.was_crowned:
        return f"{target}: {name} is version {version.number} and was beaten before; nothing to do", False
    if version is None:
        stage = Stage("policy", name)
        tags = _tags(registry, stage) | {
            f"metric.{key}": f"{value:.6g}" for key, value in figures.items() if _is_number(value)
        }
        version = registry.register(target, registry.paths.model("policy", name), md5, tags)
    registry.crown(target, version)
    before = f"beating version {champion.number} ({present:.4g})" if champion else "the first champion"
    return f"{target}: {name} (gold reward {gold:.4g}) is version {version.number}, {before}", True


def _register_reward(registry: Registry, md5: str) -> tuple[Version, str]:
    """The reward model's version, a new one if it has none, and what was done; its policy decides on the crown."""
    target = registry.params.promote.reward_name
    version = registry.version_of(target, md5)
    if version is not None:
        return version, f"{target}: the reward model is version {version.number} already; nothing to do"
    tags = _tags(registry, Stage("reward"))
    path = registry.paths.metrics("reward")
    if path.exists():
        figures = lineage.flatten(json.loads(path.read_text(encoding="utf-8")))
        tags |= {f"metric.{key}": f"{value:.6g}" for key, value in figures.items() if _is_number(value)}
    version = registry.register(target, registry.paths.model("reward"), md5, tags)
    return version, f"{target}: the reward model is version {version.number}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _nobody(figures: Mapping[str, Mapping[str, float]], gate: float) -> str:
    policies = {name: values["win_rate_low"] for name, values in figures.items() if name != "sft"}
    if not policies:
        return "no policy was evaluated, so none is promoted"
    best = max(policies, key=lambda name: policies[name])
    low = f"{policies[best]:.4g} ({best})"
    return f"no policy passes the gate: the best lower bound of a win rate is {low}, not above {gate:g}"


def _tags(registry: Registry, stage: Stage) -> dict[str, str]:
    """Where a version comes from: git, DVC's hashes of what the stage read, validation, params, the flow."""
    root = registry.paths.root
    inputs, _ = lineage.stage_files(root, stage)
    hashes = lineage.locked_hashes(root, stage) or lineage.hash_paths(root, inputs)
    return {
        **lineage.git_tags(root),
        **lineage.validation_tags(root),
        **lineage.environment_tags(),
        "alignflow.stage": stage.label,
        "alignflow.params_hash": lineage.params_hash(registry.params),
        **{f"dvc/{path}": md5 for path, md5 in hashes.items()},
    }
