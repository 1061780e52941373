"""The stage `sft`: the base model learns to answer from demonstrations."""

from __future__ import annotations

from rlhf.curves import Log, write_json
from rlhf.params import Params
from tasks.paths import Paths


def run(params: Params, paths: Paths, log: Log) -> None:
    """Read models/base and data/validated/sft; write models/sft, metrics/sft.json and reports/sft."""
    from rlhf.sft import SFTFiles, train_sft

    files = SFTFiles(
        base=paths.model("base"),
        train=paths.rows("sft", "train"),
        test=paths.rows("sft", "test"),
        model=paths.model("sft"),
        report=paths.report("sft"),
    )
    write_json(paths.metrics("sft"), train_sft(params.sft, files, params.seed, log))
