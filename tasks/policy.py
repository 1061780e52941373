"""Stage `policy`: one policy of `policies` in params.yaml, trained from the SFT model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ruamel.yaml import YAML

from rlhf.checkpoints import Checkpoints
from rlhf.curves import CurveRecorder, Log, write_json
from rlhf.errors import UserError
from rlhf.health import write_health
from rlhf.ledger import Ledger
from rlhf.params import PairParams, Params, files_read
from rlhf.policies import PolicyFiles, train_policy
from tasks.paths import Paths

if TYPE_CHECKING:
    from rlhf.policies.watching import Watch

CHECKPOINTS = {"seconds": 60.0, "share": 0.05}
"""How often: so much may a stop cost, or the writing. No param, as it changes no model."""


def run(params: Params, paths: Paths, log: Log, name: str) -> None:
    """Train the policy `name` and save it. Raises UserError where params.yaml has no such policy."""
    if name not in params.policies:
        raise UserError(f"no policy {name!r} in params.yaml; it has {', '.join(params.policies)}")
    from rlhf.models import load_tokenizer, save_model

    files = PolicyFiles(
        sft=paths.model("sft"),
        reward=paths.model("reward"),
        prompts=paths.rows("prompts", "train"),
        preferences=paths.rows("preferences", "train"),
        root=paths.root,
    )
    _refuse_unwatched(params, paths, name)
    curves = CurveRecorder(log)
    watch = _watch(params, paths, curves)
    checkpoints = Checkpoints(paths.checkpoints("policy", name), **CHECKPOINTS)
    ledger = Ledger(params.ledger)
    model = train_policy(params.policies[name], files, params.seed, curves, checkpoints, watch, ledger)
    save_model(model, load_tokenizer(files.sft), paths.model("policy", name))
    curves.write(paths.report("policy", name) / "curves.csv")
    health = write_health(paths.report("policy", name), params.policies[name].algorithm, curves.rows)
    accounts = ledger.write(paths.report("policy", name))
    figures = {**curves.rows[max(curves.rows)], "ledger": accounts, "health": health}
    write_json(paths.metrics("policy", name), figures)
    checkpoints.clear()


def _refuse_unwatched(params: Params, paths: Paths, name: str) -> None:
    """Raises UserError where rewards read what DVC does not watch: a change of it would leave the policy as it is."""
    policy, pipeline = params.policies[name], paths.root / "dvc.yaml"
    if isinstance(policy, PairParams) or not pipeline.exists():
        return
    stage = YAML(typ="safe", pure=True).load(pipeline.read_text(encoding="utf-8"))["stages"]["policy"]["do"]
    watched = [(paths.root / dep).resolve() for dep in stage["deps"]]
    for file in files_read(policy.rewards):
        path = (paths.root / file).resolve()
        if path.exists() and not any(path.is_relative_to(dep) for dep in watched):
            raise UserError(
                f"policies.{name}.rewards reads {file}, which is no dep of the stage policy in dvc.yaml, so that a "
                "change would go unnoticed; put it into rewards/, or add it to those deps"
            )


def _watch(params: Params, paths: Paths, log: Log) -> Watch | None:
    from rlhf.watch import GoldWatch, WatchFiles

    if params.evaluate.watch is None:
        return None
    files = WatchFiles(
        sft=paths.model("sft"),
        reward=paths.reward_model,
        judge=paths.model("judge"),
        prompts=paths.rows("prompts", "test"),
    )
    return GoldWatch(params.evaluate.watch, params.evaluate, files, params.seed, log)
