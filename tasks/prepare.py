"""Stage `prepare`: rows of every kind from the world or from outside, and the base model."""

from __future__ import annotations

from rlhf.curves import CurveRecorder, Log, write_json
from rlhf.data.formats import SPLITS, Row, write_rows
from rlhf.data.sources import Kind, Treatment
from rlhf.data.splits import prepare_source
from rlhf.data.world import World, make_world
from rlhf.params import Params, Source, WorldSource
from tasks.paths import KINDS, Paths

WORLD = "world"


def run(params: Params, paths: Paths, log: Log) -> None:
    """Write training and test rows of each kind, and the base model with its tokenizer."""
    section = params.prepare
    world = make_world(section.world, params.seed) if section.world and section.world_users else None
    counts: dict[str, int] = {}
    for kind in KINDS:
        written = _write_rows_of(kind, getattr(section.data, kind), world, params, paths)
        counts |= {f"{kind}_{split}_rows": count for split, count in written.items()}
    curves = CurveRecorder(log)
    _make_base_model(params, paths, world, curves)
    curves.write(paths.report("prepare") / "curves.csv")
    write_json(paths.metrics("prepare"), counts)


def _write_rows_of(
    kind: Kind, source: Source | None, world: World | None, params: Params, paths: Paths
) -> dict[str, int]:
    """Both splits of a kind; the number of rows in each."""
    folder = paths.prepared / kind
    if source is not None and not isinstance(source, WorldSource):
        data = params.prepare.data
        treatment = Treatment(data.votes, data.system, data.form)
        return prepare_source(source, kind, paths.root, params.seed, folder, treatment)
    splits: tuple[list[Row], list[Row]] = getattr(world, kind) if source else ([], [])
    for split, rows in zip(SPLITS, splits, strict=True):
        write_rows(folder / f"{split}.jsonl", rows)
    return {split: len(rows) for split, rows in zip(SPLITS, splits, strict=True)}


def _make_base_model(params: Params, paths: Paths, world: World | None, log: Log) -> None:
    """Pretrain on the world, or bring the named model into the workspace."""
    from rlhf.base_models import load_base, set_chat_template
    from rlhf.models import save_model

    section = params.prepare
    if section.base_model == WORLD and section.world and world:
        from rlhf.pretraining import pretrain, train_tokenizer

        pretraining = section.world.pretraining
        # The tokenizer sees demonstrations too, so that their words are not spelt letter by letter.
        seen = [story + rest for story, rest in world.texts]
        seen += [row["prompt"] + row["completion"] for row in world.sft[0]]
        tokenizer = train_tokenizer(seen, pretraining.vocabulary, pretraining.context)
        model = pretrain(pretraining, tokenizer, world.texts, params.seed, log)
    else:
        model, tokenizer = load_base(section.base_model, paths.root)
    set_chat_template(tokenizer, section.chat_template)
    save_model(model, tokenizer, paths.model("base"))
