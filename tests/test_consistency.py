"""One name everywhere: params.yaml, dvc.yaml, tasks/, metrics, recipes, README and Makefile agree with each other."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from rlhf.params import Params
from rlhf.params_file import load_params
from tests.tiny import ROOT, tiny_params, write_params

STAGES = ("prepare", "validate", "sft", "embed", "reward", "probe", "policy", "evaluate")
PACKAGES = ("rlhf", "tasks")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def _load(name: str) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((ROOT / name).read_text(encoding="utf-8"))


def _stages() -> dict[str, dict[str, Any]]:
    return {name: stage.get("do", stage) for name, stage in _load("dvc.yaml")["stages"].items()}


def _paths(entries: list[Any]) -> set[str]:
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def _file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.exists()), None)


@cache
def _imports(file: Path) -> frozenset[str]:
    """Our modules that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in found if name.split(".")[0] in PACKAGES and _file_of(name))


def _needed(module: str) -> set[str]:
    """The files of every module of ours behind `module`, with the packages they lie in."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _file_of(name)
        if name in seen or file is None:
            continue
        seen.add(name)
        parts = name.split(".")
        waiting += [".".join(parts[:count]) for count in range(1, len(parts))]
        waiting += _imports(file)
    return {str(file.relative_to(ROOT)) for name in seen if (file := _file_of(name))}


def test_sections_stages_and_modules_have_the_same_names() -> None:
    shared = {"seed", "ledger"}  # what several stages read
    sections = {field.alias or name for name, field in Params.model_fields.items()} - shared
    assert set(_load("params.yaml")) - shared == sections
    assert {"policy" if name == "policies" else name for name in sections} == {*STAGES, "promote"}
    assert tuple(_stages()) == STAGES
    assert all((ROOT / "tasks" / f"{name}.py").exists() for name in (*STAGES, "promote"))
    assert _load("dvc.yaml")["stages"]["policy"]["foreach"] == "${policies}"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_writes_under_its_own_name(name: str) -> None:
    stage = _stages()[name]
    own = f"{name}/${{key}}" if name == "policy" else name
    assert stage["cmd"].split()[1:] == ([name, "${key}"] if name == "policy" else [name])
    assert stage["metrics"] == [{f"metrics/{own}.json": {"cache": False}}]
    assert f"reports/{own}" in _paths(stage["outs"])
    if name in ("sft", "reward", "policy"):
        assert f"models/{own}" in _paths(stage["outs"])


@pytest.mark.parametrize("name", STAGES)
def test_every_module_of_ours_that_a_stage_imports_is_among_its_deps(name: str) -> None:
    listed = {path for path in _paths(_stages()[name]["deps"]) if path.split("/")[0] in PACKAGES}
    needed = _needed(f"tasks.{name}")
    folders = {path for path in listed if (ROOT / path).is_dir()}
    missing = {path for path in needed if path not in listed and not any(path.startswith(f"{one}/") for one in folders)}
    idle = {path for path in listed - folders if path.endswith(".py") and path not in needed}
    assert not missing, f"add to the deps of {name} in dvc.yaml: {sorted(missing)}"
    assert not idle, f"drop from the deps of {name} in dvc.yaml: {sorted(idle)}"
    assert all(any(path.startswith(f"{folder}/") for path in needed) for folder in folders)


@pytest.mark.parametrize("name", STAGES)
def test_every_dep_is_in_the_repository_or_made_by_another_stage(name: str) -> None:
    made = {path for stage in _stages().values() for path in _paths(stage["outs"])}
    for path in _paths(_stages()[name]["deps"]):
        is_made = any(path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/") for out in made)
        assert is_made or (ROOT / path).exists(), path


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_the_params_it_reads(name: str) -> None:
    """`params.sft` in tasks/sft.py must be a param of the stage sft: else a changed value goes unnoticed."""
    tree = ast.parse((ROOT / "tasks" / f"{name}.py").read_text(encoding="utf-8"))
    read = {
        node.attr.rstrip("_")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params"
    }
    declared = {param.split(".")[0] for param in _stages()[name]["params"]}
    assert read == declared, "params read by the code and params in dvc.yaml differ"


def test_stages_refuse_with_the_words_the_flow_looks_for() -> None:
    from rlhf.errors import UserError
    from tasks.__main__ import explain
    from tasks.stage import UNEXPECTED

    assert UNEXPECTED in explain(ValueError("odd"))
    assert UNEXPECTED not in explain(UserError("sft.epochs is 0; raise it"))


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *RECIPES], ids=lambda path: path.stem)
def test_every_params_file_loads_and_so_does_its_small_copy(path: Path, tmp_path: Path) -> None:
    load_params(path)
    write_params(tmp_path / "params.yaml", tiny_params(path))
    load_params(tmp_path / "params.yaml")


def test_modules_are_no_longer_than_a_reader_can_hold() -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in ROOT.glob("[frt][latl]*/**/*.py")}
    assert not {str(path): count for path, count in lines.items() if count > 500}


def test_every_module_is_imported() -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("flows", "tasks", "rlhf")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__main__.py"
    )
    script = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    done = subprocess.run(
        [sys.executable, "-c", script, "alignflow", *modules], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _shell_lines(document: Path) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash|console)?\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", document.read_text(encoding="utf-8"))
    return [line.strip() for block in blocks for line in block.splitlines()] + inline


@pytest.mark.parametrize("document", _documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_documents_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in _shell_lines(document):
        if made := re.match(r"make ([a-z0-9-]+)\b", line):
            assert made[1] in targets, f"{document.name}: `{line}`"
        if module := re.match(r"(?:\S+=\S+ )*(?:\.venv/bin/)?python -m ([a-z_.]+)(?: ([a-z]+))?", line):
            assert module[1].split(".")[0] not in {"tasks", "flows", "rlhf"} or _runnable(module[1]), (
                f"{document.name}: `{line}`"
            )
            if module[1] == "tasks" and module[2]:
                from tasks.__main__ import COMMANDS

                assert module[2] in COMMANDS, f"{document.name}: `{line}`"
        if command := re.match(r"(?:\.venv/bin/)?alignflow ([a-z]+)\b", line):
            assert command[1] in _commands(), f"{document.name}: `{line}`"


def _runnable(module: str) -> bool:
    file = _file_of(module)
    return file is not None and (
        file.with_name("__main__.py").exists() or "__main__" in file.read_text(encoding="utf-8")
    )


@cache
def _commands() -> frozenset[str]:
    from alignflow import app

    groups = (str(group.name) for group in app.registered_groups)
    commands = (command.name or str(getattr(command.callback, "__name__", "")) for command in app.registered_commands)
    return frozenset((*groups, *commands))


def test_the_lock_pins_every_dependency_and_nothing_else_than_versions() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    locked = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    wanted = {
        re.split(r"[\[<>=]", name)[0] for name in project["dependencies"] + project["optional-dependencies"]["dev"]
    }
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in wanted} <= locked


def test_a_deployment_keeps_its_results_until_the_branch_moves(tmp_path: Path) -> None:
    origin, home = tmp_path / "origin", tmp_path / "home"
    home.mkdir()
    lock = home / "alignflow" / "dvc.lock"
    _git(tmp_path, "init", "--quiet", "--initial-branch", "main", str(origin))
    _commit(origin, "first")

    _pull(origin, home)
    lock.write_text("this clone's")
    (lock.parent / "untracked").write_text("DVC's cache")
    _pull(origin, home)
    assert lock.read_text() == "this clone's"
    _commit(origin, "second")
    _pull(origin, home)
    assert (lock.read_text(), (lock.parent / "untracked").read_text()) == ("second", "DVC's cache")


def _pull(origin: Path, home: Path) -> None:
    """What prefect.yaml has a worker do before a run, but for making the environment."""
    script = _load("prefect.yaml")["pull"][0]["prefect.deployments.steps.run_shell_script"]["script"]
    for line in script.replace("{{ $ALIGNFLOW_REPOSITORY }}", str(origin)).splitlines():
        if not line.startswith("make "):
            subprocess.run(shlex.split(line), cwd=home, check=True, capture_output=True)


def _commit(repository: Path, lock: str) -> None:
    (repository / "dvc.lock").write_text(lock)
    _git(repository, "add", "dvc.lock")
    _git(repository, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", lock)


def _git(folder: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)


def test_the_deployment_names_the_flow() -> None:
    (deployment,) = _load("prefect.yaml")["deployments"]
    path, name = deployment["entrypoint"].split(":")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
