"""The stage `reward`: a reward model from noisy preferences, an audit of them, and the judge if one is asked for."""

from __future__ import annotations

from rlhf.curves import Log, write_json
from rlhf.params import Params
from tasks.paths import Paths


def run(params: Params, paths: Paths, log: Log) -> None:
    """Read models/sft and data/validated/preferences; write models/reward, models/judge, metrics and reports."""
    from rlhf.reward import RewardFiles, train_reward

    files = RewardFiles(
        start=paths.model("sft"),
        train=paths.rows("preferences", "train"),
        test=paths.rows("preferences", "test"),
        model=paths.model("reward"),
        judge=paths.model("judge"),
        report=paths.report("reward"),
    )
    write_json(paths.metrics("reward"), train_reward(params.reward, files, params.seed, log))
