"""The stage `sft`: the base model learns to answer from demonstrations."""

from __future__ import annotations

from rlhf.curves import CurveRecorder, Log, write_json
from rlhf.health import write_health
from rlhf.params import Params
from tasks.paths import Paths


def run(params: Params, paths: Paths, log: Log) -> None:
    """Read models/base and data/validated/sft; write models/sft, metrics/sft.json and reports/sft."""
    from rlhf.ledger import Ledger
    from rlhf.sft import SFTFiles, train_sft

    files = SFTFiles(
        base=paths.model("base"),
        train=paths.rows("sft", "train"),
        test=paths.rows("sft", "test"),
        model=paths.model("sft"),
        report=paths.report("sft"),
    )
    curves = CurveRecorder(log)
    metrics = train_sft(params.sft, files, params.seed, curves, Ledger(params.ledger))
    write_json(paths.metrics("sft"), {**metrics, "health": write_health(files.report, "sft", curves.rows)})
