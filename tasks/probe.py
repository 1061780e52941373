"""The stage `probe`: whether cheap tricks beat content in the reward model's eyes, before a policy finds out."""

from __future__ import annotations

from rlhf.curves import Log, write_json
from rlhf.params import Params
from tasks.paths import Paths


def run(params: Params, paths: Paths, _log: Log) -> None:
    """Read models/reward and held-out rows; write metrics/probe.json and reports/probe, `passed` in it last.

    Raises UserError, the table written, where a trick says stop and `probe.on_hackable` does too.
    """
    from rlhf.probe.cases import HeldOut
    from rlhf.probe.probing import probe_reward_model, refuse_hackable
    from rlhf.probe.report import write_report

    ratings = paths.rows("ratings", "test") if params.reward.ratings else None
    files = HeldOut(paths.rows("preferences", "test"), ratings, paths.rows("sft", "test"))
    report = paths.report("probe")
    found = probe_reward_model(params.probe, paths.model("reward"), files, params.seed)
    write_report(report, found, params.probe)
    write_json(paths.metrics("probe"), found.figures)
    refuse_hackable(found, params.probe, report.relative_to(paths.root))
    # What the policies depend on: always the same bytes, so that another verdict or threshold retrains none of them.
    (report / "passed").write_text("Policies may be trained on models/reward.\n", encoding="utf-8")
