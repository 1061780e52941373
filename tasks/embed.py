"""The stage `embed`: frozen embeddings of every answer, for the noise estimate, trust and frozen score heads."""

from __future__ import annotations

from rlhf.curves import Log, write_json
from rlhf.params import Params
from tasks.paths import Paths


def run(params: Params, paths: Paths, _log: Log) -> None:
    """Read a model and data/validated/{preferences,ratings}; write data/embeddings, metrics and reports/embed."""
    from rlhf.embeddings import EmbedFiles, embed_answers
    from rlhf.ledger import Ledger

    files = EmbedFiles(
        model=paths.embedder(params.embed.model),
        rows=paths.validated,
        embeddings=paths.embeddings,
        report=paths.report("embed"),
    )
    write_json(paths.metrics("embed"), embed_answers(params.embed, files, Ledger(params.ledger)))
