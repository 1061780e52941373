"""Stage `policy`: one policy of `policies` in params.yaml, trained from the SFT model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.checkpoints import Checkpoints
from rlhf.curves import CurveRecorder, Log, write_json
from rlhf.errors import UserError
from rlhf.health import write_health
from rlhf.ledger import Ledger
from rlhf.params import PairParams, Params, files_read
from rlhf.policies import PolicyFiles, train_policy
from tasks.paths import Paths, refuse_unwatched

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
    policy = params.policies[name]
    rewards = {} if isinstance(policy, PairParams) else policy.rewards
    refuse_unwatched(paths, "policy", f"policies.{name}.rewards", files_read(rewards))
    curves = CurveRecorder(log)
    watch = _watch(params, paths, curves)
    checkpoints = Checkpoints(paths.checkpoints("policy", name), **CHECKPOINTS)
    ledger = Ledger(params.ledger)
    model = train_policy(policy, files, params.seed, curves, checkpoints, watch, ledger)
    save_model(model, load_tokenizer(files.sft), paths.model("policy", name))
    curves.write(paths.report("policy", name) / "curves.csv")
    health = write_health(paths.report("policy", name), policy.algorithm, curves.rows)
    accounts = ledger.write(paths.report("policy", name))
    figures = {**curves.rows[max(curves.rows)], "ledger": accounts, "health": health}
    write_json(paths.metrics("policy", name), figures)
    checkpoints.clear()


def _watch(params: Params, paths: Paths, log: Log) -> Watch | None:
    from rlhf.evaluation.prompts import GoldFiles, gold_files
    from rlhf.watch import GoldWatch, WatchFiles

    if params.evaluate.watch is None:
        return None
    files = WatchFiles(
        sft=paths.model("sft"),
        reward=paths.reward_model,
        gold=GoldFiles(sft=paths.model("sft"), judge=paths.model("judge"), root=paths.root),
        prompts=paths.rows("prompts", "test"),
    )
    refuse_unwatched(paths, "policy", "evaluate.gold", gold_files(params.evaluate))
    return GoldWatch(params.evaluate.watch, params.evaluate, files, params.seed, log)
