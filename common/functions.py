"""The user's Python functions, which a config names as `module:function`, and how their modules leave ours alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from common.config import UserError


def our_directory() -> str:
    """Where Ratchet's packages are imported from."""
    return str(Path(__file__).parents[1])


def import_ours() -> None:
    """Ratchet's packages, imported before the user's directory is on the path: a `common` there then hides none."""
    for package in ("actors", "common", "deploy", "learner"):
        import_module(package)


def load_function(path: str, setting: str) -> Callable[..., Any]:
    """The Python function that `module:function` names. Raises UserError saying what failed to import."""
    module_name, separator, name = path.partition(":")
    if not separator:
        raise UserError(f"{setting} ({path}) must read module:function, such as deploy.tasks.larger:correct")
    try:
        function = getattr(import_module(module_name), name, None)
    except Exception as error:
        raise UserError(
            f"{setting} ({path}): module {module_name} cannot be imported ({type(error).__name__}: {error}); "
            "it must be installed, or lie in the directory ratchet is started from"
        ) from error
    if not callable(function):
        raise UserError(f"{setting} ({path}): module {module_name} has no function {name}")
    return function
