"""Reading `params.yaml`: every fault becomes a sentence with the key in dotted form, the value and the remedy."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlhf.errors import UserError
from rlhf.params import Params

Sections = TypeVar("Sections", bound=BaseModel)


def load_params(path: Path) -> Params:
    """Read and check a params file.

    Raises UserError with one sentence per problem, keys in dotted form (`sft.learning_rate`).
    """
    return load_sections(path, Params)


def load_sections(path: Path, model: type[Sections]) -> Sections:
    """Read and check a file of the sections that `model` has; raises UserError as `load_params`."""
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run from the repository's root or name a params file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line}: not valid YAML ({reason}); mend that line") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} holds {type(raw).__name__}, not a map of sections; start from the repository's params.yaml"
        )
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_explain_all(error, raw, path, model))) from None


def _explain_all(error: ValidationError, raw: dict[str, Any], path: Path, model: type[BaseModel]) -> list[str]:
    """A sentence per key; a union (a number, or the word `estimate`) has a fault per member, joined by `or`."""
    faults: dict[str, list[str]] = {}
    for problem in error.errors():
        subject, fault = _explain(problem, raw, model)
        faults.setdefault(subject, []).append(fault)
    return [f"{path}: {subject}{' or '.join(listed)}" for subject, listed in faults.items()]


def _explain(problem: Any, raw: dict[str, Any], model: type[BaseModel]) -> tuple[str, str]:
    """The key in dotted form with the value found, and what is wrong with it and how to mend it."""
    keys, found = _dotted(problem["loc"], raw, problem["type"] == "missing")
    dotted = ".".join(keys) or "the file"
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(keys[-1], _known_keys(model, keys[:-1], raw), n=1, cutoff=0.0)
            return f"unknown key {dotted}; ", f"did you mean {'.'.join([*keys[:-1], *near])}?"
        case "missing":
            return f"{dotted} is missing; ", "add it (the repository's params.yaml shows a value)"
        case "union_tag_not_found":
            return f"{dotted} has no {problem['ctx']['discriminator']}; ", "add it"
        case "value_error":
            return f"{dotted}: ", str(problem["ctx"]["error"])
    shown = repr(found) if isinstance(found, (str, int, float, bool, type(None))) else type(found).__name__
    return f"{dotted} is {shown}; ", problem["msg"][0].lower() + problem["msg"][1:]


def _dotted(location: tuple[int | str, ...], raw: Any, is_missing: bool) -> tuple[list[str], Any]:
    """The keys of the user's file along pydantic's location, which names unions' members too.

    What the file does not hold is such a member, but for the end of a location that is missing.
    """
    keys: list[str] = []
    value = raw
    for index, part in enumerate(location):
        is_last = index == len(location) - 1
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]  # pyright: ignore[reportCallIssue, reportArgumentType]: dict or list, as checked
            keys.append(str(part))
        elif is_last and is_missing:
            keys.append(str(part))
    return keys, value


def _known_keys(model: Any, keys: list[str], raw: Any) -> list[str]:
    """The keys that the section at `keys` accepts."""
    models = [model]
    for key in keys:
        raw = raw.get(key, {}) if isinstance(raw, dict) else {}
        models = [inner for outer in models for inner in _models_in(_annotation(outer, key))]
    tagged = [m for m in models if _fits_tag(m, raw)]
    return [field.alias or name for m in tagged or models for name, field in m.model_fields.items()]


def _annotation(model: Any, key: str) -> Any:
    for name, field in model.model_fields.items():
        if (field.alias or name) == key:
            return field.annotation
    return dict[str, model]


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _models_in(inner)]


def _fits_tag(model: Any, raw: Any) -> bool:
    """Whether the map's `kind` or `algorithm` names this member of a union."""
    return isinstance(raw, dict) and any(
        raw.get(tag) in get_args(model.model_fields[tag].annotation)
        for tag in ("kind", "algorithm")
        if tag in model.model_fields
    )
