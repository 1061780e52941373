"""The stage `reward`: a reward model from noisy labels, an audit of them, and the judge if one is asked for."""

from __future__ import annotations

from rlhf.curves import CurveRecorder, Log, write_json
from rlhf.health import write_health
from rlhf.params import Params
from tasks.paths import Paths


def run(params: Params, paths: Paths, log: Log) -> None:
    """Read models/sft, data/embeddings and validated rows; write models/reward, models/judge, metrics and reports."""
    from rlhf.reward import train_reward
    from rlhf.reward_rows import RewardFiles, kind_of

    kind = kind_of(params.reward)
    files = RewardFiles(
        start=paths.model("sft"),
        embedder=paths.embedder(params.embed.model),
        embeddings=paths.embeddings,
        train=paths.rows(kind, "train"),
        test=paths.rows(kind, "test"),
        model=paths.model("reward"),
        judge=paths.model("judge"),
        report=paths.report("reward"),
    )
    curves = CurveRecorder(log)
    metrics = train_reward(params.reward, files, params.seed, curves)
    write_json(paths.metrics("reward"), {**metrics, "health": write_health(files.report, "reward", curves.rows)})
