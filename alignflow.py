"""The command `alignflow`: the front door to the flow, its stages, its servers and its recipes."""

from __future__ import annotations

import difflib
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from alignflow_data import data, print_table
from rlhf.data.formats import Row
from rlhf.errors import UserError
from rlhf.params_file import load_params
from tasks.paths import Paths, find_root

app = typer.Typer(
    help="Align a language model to human preferences: data, SFT, reward model, policies, evaluation, promotion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
    port: Annotated[int, typer.Option(help="Of Prefect's server, where PREFECT_API_URL is not set.")] = 4200,
    name: Annotated[str, typer.Option(help="Of the schedule on Prefect's server.")] = "scheduled",
) -> None:
    """Serve scheduled runs until Ctrl-C, never two at once."""
    from flows import schedule as scheduling

    arguments = ["--cron", cron, "--timezone", timezone, "--port", str(port), "--name", name]
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
    for grouping in found.audit.groupings:
        print(f"labels are wrong together by {grouping}")
    print(f"the pairs side by side  {folder / 'audit.html'}\nall figures             {folder / 'audit.parquet'}")
    if apply:
        cleaned, removed = apply_audit(folder, found)
        print(f"cleaned copy            {cleaned}\nrows left out           {removed}")


def _read_pairs(file: Path) -> list[Row]:
    from rlhf.data.sources import load_source, whole_file

    return list(load_source(whole_file(file), "preferences", Path()))


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
    print_table(f"Do cheap tricks beat content? {found.verdict}", tabulate(found))
    print(f"the worst answers side by side  {folder / 'probe.html'}")
    refuse_hackable(found, params.probe, folder)


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
