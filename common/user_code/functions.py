"""Imports functions that a config names as `module:function`, and explains why one failed. Runs anywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.user_code.calls import find_function
from common.user_code.errors import UserCodeError
from common.user_code.packages import RATCHET_PACKAGES, holds_ratchet


def load_function(path: str, setting: str) -> Callable[..., Any]:
    """The Python function that `module:function` names. Raises UserError that says what failed to import."""
    try:
        return find_function(path)
    except UserCodeError as error:
        raise UserError(explain_import(path, setting, error)) from error


def explain_import(path: str, setting: str, error: UserCodeError, *, users_first: bool = False) -> str:
    """Why a function cannot be imported, with the remedy. `users_first`: the user's modules are found before Ratchet's,
    as in a worker process."""
    message = f"{setting} ({path}){':' if error.reason.startswith('module ') else ''} {error.reason}"
    same_name = _users_package(error.missing or path.partition(":")[0])
    if same_name and users_first:
        return (
            f"{message}; here the name {same_name[0]} means your own {same_name[1]}, which hides Ratchet's modules of "
            "the same names: RewardInput is needed for annotations only, so import it under `if TYPE_CHECKING:`"
        )
    if same_name:
        return (
            f"{message}; {same_name[1]} exists, but here the name {same_name[0]} means Ratchet's own package: rename "
            'yours, or for a reward function set reward.isolation = "process" (labeller.isolation for a labeller), '
            "where yours is found"
        )
    if error.missing:
        return f"{message}; it must be installed, in the directory ratchet is started from, or next to the config file"
    return message


def _users_package(module: str) -> tuple[str, Path] | None:
    """The name and the path of the user's package or module that has the same name as the module's package in Ratchet.
    None if there is none."""
    name = module.partition(".")[0]
    if name not in RATCHET_PACKAGES:
        return None
    for directory in dict.fromkeys((os.getcwd(), *sys.path)):
        for path in (Path(directory, name), Path(directory, f"{name}.py")):
            if path.exists() and not holds_ratchet(directory):
                return name, path
    return None
