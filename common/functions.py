"""The user's Python functions, which a config names as `module:function`, and how their modules leave ours alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from common.config import UserError
from common.user_code import UserCodeError, find_function

OURS = ("actors", "common", "deploy", "learner")


def our_directory() -> str:
    """Where Ratchet's packages are imported from."""
    return str(Path(__file__).parents[1])


def import_ours() -> None:
    """Ratchet's packages, imported before the user's directory is on the path: a `common` there then hides none."""
    for package in OURS:
        import_module(package)


def load_function(path: str, setting: str) -> Callable[..., Any]:
    """The Python function that `module:function` names. Raises UserError saying what failed to import."""
    try:
        return find_function(path)
    except UserCodeError as error:
        raise UserError(explain_import(path, setting, error)) from error


def explain_import(path: str, setting: str, error: UserCodeError) -> str:
    """Why a function could not be had, with the remedy."""
    message = f"{setting} ({path}){'' if error.reason.startswith('must') else ':'} {error.reason}"
    missing = error.__cause__
    if ours := _hidden_by_ours(path, missing):
        name, there = ours
        return (
            f"{message}; {there} exists, but here the name {name} means Ratchet's own package: rename yours, or for a "
            'reward function set reward.isolation = "process" (labeller.isolation for a labeller), where yours is found'
        )
    if isinstance(missing, (ModuleNotFoundError, ValueError)):
        return f"{message}; it must be installed, or lie in the directory ratchet is started from"
    return message


def _hidden_by_ours(path: str, error: BaseException | None) -> tuple[str, str] | None:
    """The package of Ratchet's that stood for one of the user's, and where theirs is."""
    missing = error.name if isinstance(error, ImportError) and error.name else path.partition(":")[0]
    name = missing.partition(".")[0]
    if name not in OURS:
        return None
    for directory in (os.getcwd(), *sys.path):
        for there in (Path(directory, name), Path(directory, f"{name}.py")):
            if there.exists() and there.parent.resolve() != Path(our_directory()).resolve():
                return name, str(there)
    return None
