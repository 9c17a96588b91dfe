"""Packages that only some settings need: they are checked before anything starts. Runs anywhere."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from common.errors import UserError


def require(module: str, package: str, needed_by: str) -> None:
    """Raises UserError unless the package, which has this module, is installed."""
    if not is_installed(module):
        raise UserError(f"{needed_by} needs the package {package}, which is not installed; call pip install {package}")


def is_installed(module: str) -> bool:
    """True if there is such a module. A directory with this name but without an __init__.py does not count, such as the
    directory `wandb` that W&B writes, or a directory `datasets` with data."""
    if sys.modules.get(module, sys) is None:  # imports of it are blocked, and find_spec would raise ValueError
        return False
    spec = find_spec(module)
    return spec is not None and spec.origin is not None
