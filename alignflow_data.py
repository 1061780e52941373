"""The commands `alignflow data …`: look into data before any stage reads them, and make some with a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.synthesis.making import Made

data = typer.Typer(help="Look into data before any stage reads them, and make some with a model.", no_args_is_help=True)


@data.command("inspect")
def inspect_data(
    file: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV or Parquet, or a folder saved by `datasets`.")],
    shape: Annotated[str | None, typer.Option(help="A shape of docs/data.md; by default guessed.")] = None,
    kind: Annotated[str | None, typer.Option(help="sft, preferences, ratings or prompts; by default guessed.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder or hub id: lengths in its tokens too.")] = None,
) -> None:
    """Guess a file's shape and show the params that read it, its columns, lengths and first rows."""
    from rlhf.data.inspect import inspect_file

    found = inspect_file(file, shape, kind, _token_counter(tokenizer) if tokenizer else None)
    print_table(f"{file}: the columns", found.columns)
    counts = ", ".join(f"{count} {name}" for name, count in found.counts.items())
    print(f"read as {found.guess.shape} ({found.guess.kind}): {counts}")
    if found.others:
        print("also fits: " + ", ".join(f"{other.shape} ({other.kind})" for other in found.others))
    print(f"\nIn params.yaml:\n\n{found.snippet}\n")
    print_table("Lengths", found.lengths)
    print_table("The first rows", found.rows)


@data.command("classifier")
def train_classifier(
    file: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV or Parquet with texts and their labels.")],
    folder: Annotated[Path, typer.Option(help="Where the classifier goes, such as rewards/sentiment.")],
    part: Annotated[int, typer.Option(min=1, help="Learn from this part of the rows; the others measure it.")] = 1,
    parts: Annotated[int, typer.Option(min=1, help="How many parts; row n belongs to part n modulo this.")] = 2,
    text: Annotated[str, typer.Option(help="The column of texts.")] = "text",
    label: Annotated[str, typer.Option(help="The column of labels.")] = "label",
) -> None:
    """Train a small text classifier for rewards of the kind `classifier`: TF-IDF of words and word pairs."""
    from rlhf.data.files import read_file
    from rlhf.rewards.tfidf import measure_text_classifier, train_text_classifier

    if part > parts:
        raise UserError(f"--part is {part} of {parts} parts; take one of 1 to {parts}")
    rows = [{"text": row.get(text), "label": str(row.get(label))} for _, row in read_file(file, str(file))]
    train_text_classifier(rows[part - 1 :: parts], folder, ngrams=2, features=50_000, inverse_penalty=4.0)
    others = [row for number, row in enumerate(rows) if number % parts != part - 1]
    if others:
        print(
            f"{measure_text_classifier(others, folder):.3f} of the {len(others)} rows of other parts are labelled right"
        )
    print(f"the classifier          {folder}")


def _token_counter(name: str) -> Callable[[str], int]:
    from rlhf.models import load_tokenizer

    tokenizer = load_tokenizer(name)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


Out = Annotated[Path, typer.Option(help="JSON lines; the reports go to a folder beside it.")]
Speaking = Annotated[str, typer.Option("--model", help="A folder, a hub id, or package:NAME.")]
Temperature = Annotated[float, typer.Option(min=0.01, max=10, help="At which answers are sampled.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts that the model goes on with at a time.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite OUT.")]
Tokens = Annotated[int, typer.Option(min=1, help="At most, per text that the model writes.")]


@data.command("instructions")
def make_instruction_file(
    seeds: Annotated[Path, typer.Argument(help="Tasks with answers, in any shape that gives sft rows.")],
    model: Speaking,
    out: Out,
    count: Annotated[int, typer.Option(min=1, help="Instructions to make.")],
    tries: Annotated[int | None, typer.Option(min=1, help="Candidates at most; by default 20 per instruction.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Tasks shown to the model at a time.")] = 8,
    made_examples: Annotated[int, typer.Option(min=0, help="Of those, made ones at most.")] = 2,
    shortest: Annotated[int, typer.Option(min=1, help="Words of an instruction.")] = 4,
    longest: Annotated[int, typer.Option(min=1, help="Words of an instruction.")] = 150,
    overlap: Annotated[float, typer.Option(min=0.01, max=1, help="ROUGE-L from which two are alike.")] = 0.7,
    banned: Annotated[list[str] | None, typer.Option(help="Instead of the words of docs/synthetic.md.")] = None,
    list_tokens: Tokens = 512,
    answer_tokens: Tokens = 512,
    temperature: Temperature = 0.7,
    batch_size: BatchSize = 8,
    seed: int = 17,
    force: Force = False,
) -> None:
    """Make instructions with answers out of a few (Self-Instruct)."""
    from rlhf.synthesis.files import read_kind, refuse_overwriting
    from rlhf.synthesis.instructions import BANNED, InstructionSettings
    from rlhf.synthesis.making import write_instructions
    from rlhf.synthesis.speaker import load_speaker

    refuse_overwriting(out, force)
    settings = InstructionSettings(
        count, tries or 20 * count, examples, made_examples, batch_size, shortest, longest,
        tuple(banned) if banned is not None else BANNED, overlap, list_tokens, answer_tokens, temperature, seed,
    )  # fmt: skip
    rows = read_kind(seeds, "sft")
    made = write_instructions(rows, out, load_speaker(model, temperature, batch_size, seed), settings)
    _print_made(out, made)


@data.command("preferences")
def make_preference_file(
    prompts: Annotated[Path, typer.Argument(help="Prompts, with the columns that the rewards read.")],
    model: Speaking,
    out: Out,
    rank: Annotated[Path | None, typer.Option(help="YAML with the map `rewards` of docs/rewards.md.")] = None,
    reward_model: Annotated[str | None, typer.Option(help="A folder or a hub id: for kind reward_model.")] = None,
    samples: Annotated[int, typer.Option(help="Answers per prompt.")] = 4,
    against: Annotated[str, typer.Option(help="worst, or random: by lot one that is worse than the best.")] = "worst",
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 1.0,
    batch_size: BatchSize = 64,
    seed: int = 17,
    force: Force = False,
) -> None:
    """Make preferences between a model's own answers, ranked by rewards."""
    from rlhf.synthesis.files import read_kind, refuse_overwriting
    from rlhf.synthesis.making import write_preferences
    from rlhf.synthesis.preferences import PreferenceSettings, load_ranking
    from rlhf.synthesis.speaker import load_speaker

    refuse_overwriting(out, force)
    settings = PreferenceSettings(samples, against, max_new_tokens, temperature, seed)
    rows = read_kind(prompts, "prompts")
    rewards = load_ranking(rank, reward_model, model, batch_size)
    made = write_preferences(rows, out, load_speaker(model, temperature, batch_size, seed), rewards, settings)
    _print_made(out, made)


def _print_made(out: Path, made: Made) -> None:
    for name, tally in made.tallies.items():
        print(f"{name}: {tally.describe()}")
    print(f"{len(made.rows)} rows  {out}\nreports  {made.folder}")


def print_table(title: str, rows: list[dict[str, str]]) -> None:
    """A table on the terminal, whose columns are the keys of all rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*(Text(row.get(name, "")) for name in names))
    Console(width=max(Console().width, 160)).print(table)
