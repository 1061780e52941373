"""Reward functions of one's own, from a Python file beside the params."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.errors import UserError, first_line

FORM = "(prompts, completions, **columns)"


def load_function(path: Path, name: str) -> Any:
    """The function `name` of a Python file.

    Raises UserError where there is no such file or function, where the file fails, or where the function cannot be
    called with prompts, completions and all columns by name.
    """
    function: Any = getattr(_load_module(path), name, None)
    if not inspect.isfunction(function):
        raise UserError(f"{path} has no function {name!r}; write `def {name}{FORM}` there, or give another name")
    signature = inspect.signature(function)
    if not _takes_columns(signature):
        raise UserError(f"{path}: {name} takes {signature}, but is called with {FORM}; change its arguments to that")
    return function


def _load_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{path}, which the reward 'function' names, does not exist; write it, or mend the path")
    module_name = f"alignflow_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"{path} does not load ({type(error).__name__}: {first_line(error)}); mend it; --debug shows where"
        ) from error
    return module


def _takes_columns(signature: inspect.Signature) -> bool:
    """Whether it takes two arguments by place and any by name; those that it asks for by name must be columns."""
    parameters = signature.parameters.values()
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        return False
    asked = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    try:
        signature.bind([], [], **dict.fromkeys(asked, []))
    except TypeError:
        return False
    return True
