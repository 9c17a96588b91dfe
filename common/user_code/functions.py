"""The user's Python functions, which a config names as `module:function`, and how their modules leave ours alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.user_code.calls import NotFoundError, UserCodeError, find_function

OURS = ("actors", "common", "deploy", "learner")


def package_root() -> str:
    """Where Ratchet's packages are imported from."""
    return str(Path(__file__).parents[2])


def import_ratchet_first() -> None:
    """Ratchet's packages, imported before the user's directory is on the path: a `common` there then hides none."""
    for package in OURS:
        import_module(package)


def load_function(path: str, setting: str) -> Callable[..., Any]:
    """The Python function that `module:function` names. Raises UserError saying what failed to import."""
    try:
        return find_function(path)
    except UserCodeError as error:
        raise UserError(explain_import(path, setting, error)) from error


def explain_import(path: str, setting: str, error: UserCodeError, *, ours_last: bool = False) -> str:
    """Why a function could not be had, with the remedy. `ours_last`: where the user's modules are found before
    Ratchet's."""
    message = f"{setting} ({path}){':' if error.reason.startswith('module ') else ''} {error.reason}"
    hidden = _hidden_by_ours(error.missing if isinstance(error, NotFoundError) else path.partition(":")[0])
    if hidden and ours_last:
        return (
            f"{message}; the name {hidden[0]} means your own {hidden[1]} here, whose modules hide Ratchet's of the "
            "same names: RewardInput is needed for annotations only, so import it under `if TYPE_CHECKING:`"
        )
    if hidden:
        return (
            f"{message}; {hidden[1]} exists, but here the name {hidden[0]} means Ratchet's own package: rename yours, "
            'or for a reward function set reward.isolation = "process" (labeller.isolation for a labeller), where '
            "yours is found"
        )
    if isinstance(error, NotFoundError):
        return f"{message}; it must be installed, in the directory ratchet is started from, or next to the config file"
    return message


def _hidden_by_ours(module: str) -> tuple[str, Path] | None:
    """The package of Ratchet's that a module is looked for in, and the user's of the same name, if there is one."""
    name = module.partition(".")[0]
    if name not in OURS:
        return None
    for directory in dict.fromkeys((os.getcwd(), *sys.path)):
        for there in (Path(directory, name), Path(directory, f"{name}.py")):
            if there.exists() and not holds_ours(directory):
                return name, there
    return None


def holds_ours(directory: str) -> bool:
    """Whether Ratchet's packages are in a directory, those that run here or another copy of them."""
    return all(
        Path(directory, file).exists() for file in ("common/reward_input.py", "actors/scoring/function_worker.py")
    )
