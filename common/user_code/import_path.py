"""Directories where the user's modules are found: the current one, and the one of the config file.

Runs in the driver, and in every role's process when it starts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from common.user_code.packages import import_ratchet_first

IMPORT_FROM = "RATCHET_IMPORT_FROM"  # JSON list of directories; ratchet submit sets it for a job, with relative paths
_directories: list[str] = []


def find_users_modules(*directories: Path) -> None:
    """Makes modules importable from the current directory, then from `directories`, here and in roles' processes."""
    import_ratchet_first()  # an editable installation of Ratchet is looked up after sys.path
    given = os.environ.get(IMPORT_FROM)
    _directories[:] = json.loads(given) if given else [str(directory.absolute()) for directory in directories]
    sys.path.extend(name for name in (str(Path.cwd()), *_directories) if name not in sys.path)


def users_directories() -> Sequence[str]:
    """The directories that are searched after the current one."""
    return _directories


def module_file(name: str) -> Path | None:
    """The file of a module, found without importing it. None if it has none."""
    first, *others = name.split(".")
    spec = next((found for finder in sys.meta_path if (found := finder.find_spec(first, None)) is not None), None)
    for part in others:
        if spec is None:
            return None
        # Only the last part of its name: with the whole name, Python would look for the parent in sys.modules, where a
        # directory without __init__.py may be missing.
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations or ()))
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def prepare_process() -> None:
    """Called when a role's process starts: imports Ratchet's packages, then adds the user's directories to sys.path.
    Ray then puts the driver's current directory first."""
    import_ratchet_first()
    sys.path.extend(json.loads(os.environ.get(IMPORT_FROM, "[]")))
