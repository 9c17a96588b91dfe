"""Directories where the user's modules are found: the current one, and the one of the config file.

Runs in the driver, and in every role's process when it starts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.user_code.packages import import_ratchet_first

IMPORT_FROM = "RATCHET_IMPORT_FROM"  # JSON list of directories; ratchet submit sets it, with relative names, for a job
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
    path: Sequence[str] | None = None
    spec = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        found = (finder.find_spec(".".join(parts[:count]), path) for finder in sys.meta_path)
        if (spec := next((one for one in found if one is not None), None)) is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def prepare_process() -> None:
    """Called when a role's process starts: imports Ratchet's packages, then adds the user's directories to sys.path.
    Ray then puts the driver's current directory first."""
    import_ratchet_first()
    sys.path.extend(json.loads(os.environ.get(IMPORT_FROM, "[]")))
