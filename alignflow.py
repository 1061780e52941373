"""The command `alignflow`: the front door to the flow, its stages, its servers and its recipes."""

from __future__ import annotations

import difflib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf.data.formats import Row
from rlhf.errors import UserError
from rlhf.params_file import load_params
from tasks.paths import Paths, find_root

if TYPE_CHECKING:
    from rlhf.synthesis.making import Made

app = typer.Typer(
    help="Align a language model to human preferences: data, SFT, reward model, policies, evaluation, promotion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data = typer.Typer(help="Look into data before any stage reads them, and make some with a model.", no_args_is_help=True)
app.add_typer(data, name="data")

Parallel = Annotated[int | None, typer.Option(min=1, help="Policies trained at a time; 1 on a GPU, else cores.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def main() -> None:
    """Run the command; wrong input ends in one sentence and exit status 1."""
    try:
        app()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


@app.command()
def run(parallel: Parallel = None, max_hours: float = 72.0, debug: Debug = False) -> None:
    """Bring the whole pipeline up to date and show the policies."""
    from flows import alignment

    arguments = ["--max-hours", str(max_hours)]
    arguments += ["--parallel", str(parallel)] if parallel else []
    raise typer.Exit(alignment.main(arguments + ["--debug"] * debug))


@app.command()
def stage(name: str, policy: Annotated[str | None, typer.Argument()] = None, debug: Debug = False) -> None:
    """Run the body of one stage, without DVC: for looking into it."""
    _run_stage(name, policy, debug)


@app.command()
def promote(debug: Debug = False) -> None:
    """Register the best policy that passes its gate."""
    _run_stage("promote", None, debug)


@app.command()
def sync(debug: Debug = False) -> None:
    """Send MLflow what it could not take while stages ran."""
    _run_stage("sync", None, debug)


def _run_stage(name: str, policy: str | None, debug: bool) -> None:
    from tasks.__main__ import main as run_stage

    raise typer.Exit(run_stage([name, *([policy] if policy else []), *(["--debug"] if debug else [])]))


@app.command()
def ui(mlflow_port: int = 5000, prefect_port: int = 4200) -> None:
    """Serve MLflow and Prefect on this machine until Ctrl-C."""
    from flows.servers import open_interfaces

    try:
        raise typer.Exit(open_interfaces(Paths(find_root()), mlflow_port, prefect_port))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def schedule(
    cron: Annotated[str, typer.Option(help='When to run, as "0 2 * * *".')],
    timezone: Annotated[str, typer.Option(help="Of the cron line.")] = "UTC",
    parallel: Parallel = None,
) -> None:
    """Serve scheduled runs until Ctrl-C, never two at once."""
    from flows import schedule as scheduling

    arguments = ["--cron", cron, "--timezone", timezone]
    raise typer.Exit(scheduling.main(arguments + (["--parallel", str(parallel)] if parallel else [])))


@app.command()
def check() -> None:
    """Check params.yaml and every recipe."""
    root = find_root()
    problems: list[str] = []
    for path in [root / "params.yaml", *_recipes(root).values()]:
        try:
            load_params(path)
            print(f"{path.relative_to(root)}: good")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@app.command()
def audit(
    file: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV or Parquet with prompt, chosen, rejected.")],
    embedder: Annotated[str, typer.Option(help="A model folder, a hub id, or package:NAME.")] = MINILM,
    noise_rate: Annotated[float | None, typer.Option(min=0, max=0.49, help="By default estimated.")] = None,
    group: Annotated[str | None, typer.Option(help="Column by which labels may be wrong together.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("reports/audit"),
    apply: Annotated[bool, typer.Option("--apply", help="Also write cleaned.jsonl and removed.jsonl.")] = False,
) -> None:
    """Find preference labels that are probably wrong; needs an embedder and no training."""
    from rlhf.audit_report import ACTIONS, write_audit
    from rlhf.label_audit import apply_audit, audit_labels

    found = audit_labels(_read_pairs(file), embedder, noise_rate, group)
    write_audit(folder, found.audit)
    actions = found.audit.actions
    print(f"{len(actions)} pairs judged, {found.audit.left_out} left out; noise rate {found.audit.rate:.3f}")
    print(", ".join(f"{action} {actions.count(action)}" for action in ACTIONS))
    print(f"the pairs side by side  {folder / 'audit.html'}\nall figures             {folder / 'audit.parquet'}")
    if apply:
        cleaned, removed = apply_audit(folder, found)
        print(f"cleaned copy            {cleaned}\nrows left out           {removed}")


def _read_pairs(file: Path) -> list[Row]:
    from rlhf.data.sources import load_source, whole_file

    return list(load_source(whole_file(file), "preferences", Path()))


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
    _print_table(f"{file}: the columns", found.columns)
    counts = ", ".join(f"{count} {name}" for name, count in found.counts.items())
    print(f"read as {found.guess.shape} ({found.guess.kind}): {counts}")
    if found.others:
        print("also fits: " + ", ".join(f"{other.shape} ({other.kind})" for other in found.others))
    print(f"\nIn params.yaml:\n\n{found.snippet}\n")
    _print_table("Lengths", found.lengths)
    _print_table("The first rows", found.rows)


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


@app.command()
def probe(
    reward_model: Annotated[str, typer.Argument(help="A folder, or a hub id, with one score per text.")],
    file: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV or Parquet with prompt, chosen, rejected.")],
    folder: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("reports/hackability"),
) -> None:
    """Ask a reward model whether cheap tricks beat content, by the limits in params.yaml."""
    from rlhf.label_audit import is_usable
    from rlhf.probe.cases import cases_from_preferences
    from rlhf.probe.probing import draw_cases, refuse_hackable, try_tricks
    from rlhf.probe.report import tabulate, write_report
    from rlhf.scoring import RewardModel, find_reward_model

    params = load_params(Paths(find_root()).params)
    rows = [row for row in _read_pairs(file) if is_usable(row)]
    if not rows:
        raise UserError(f"{file} has no row with two different texts as answers; check its columns")
    score = RewardModel(find_reward_model(reward_model), params.probe.batch_size).score
    cases = draw_cases(cases_from_preferences(rows), params.probe, params.seed)
    found = try_tricks(score, cases, params.probe, str(file))
    write_report(folder, found, params.probe)
    _print_table(f"Do cheap tricks beat content? {found.verdict}", tabulate(found))
    print(f"the worst answers side by side  {folder / 'probe.html'}")
    refuse_hackable(found, params.probe, folder)


def _print_table(title: str, rows: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*(Text(row.get(name, "")) for name in names))
    Console(width=max(Console().width, 160)).print(table)


@app.command()
def recipe(name: Annotated[str | None, typer.Argument(help="Without a name: list them.")] = None) -> None:
    """Make recipes/NAME.yaml the workspace's params.yaml."""
    root = find_root()
    if name is None:
        for known, path in _recipes(root).items():
            first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            print(f"{known:28s}{first}")
        return
    print(apply_recipe(root, name))


def apply_recipe(root: Path, name: str) -> str:
    """Copy a recipe over params.yaml, unless that holds work that would be lost; says what was done.

    Raises UserError where there is no such recipe, or params.yaml differs from the last commit and
    from every recipe.
    """
    recipes = _recipes(root)
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1, cutoff=0.0)
        raise UserError(f"there is no recipe {name!r} in recipes/; did you mean {', '.join(near) or 'to add one'}?")
    load_params(recipes[name])
    target, wanted = root / "params.yaml", recipes[name].read_bytes()
    present = target.read_bytes() if target.exists() else b""
    if present == wanted:
        return f"params.yaml is the recipe {name} already"
    is_recipe = any(present == path.read_bytes() for path in recipes.values())
    if present and not is_recipe and not _is_committed(root, target):
        raise UserError(
            f"params.yaml has changes that are in no commit and no recipe, and {name} would overwrite them; "
            "commit them, save them as recipes/NAME.yaml, or drop them with `git restore params.yaml`"
        )
    target.write_bytes(wanted)
    return f"params.yaml is now the recipe {name}; `git restore params.yaml` brings the committed one back"


def _recipes(root: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted((root / "recipes").glob("*.yaml"))}


def _is_committed(root: Path, path: Path) -> bool:
    """Whether git holds the file as it is."""
    command = ["git", "diff", "--quiet", "HEAD", "--", str(path)]
    return subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    main()
