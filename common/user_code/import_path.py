"""Where the user's modules are found: in the current directory, and in the directory of the config file.

Runs in the driver, and in every role's process as it begins.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.user_code.functions import import_ratchet_first

IMPORT_FROM = "RATCHET_IMPORT_FROM"  # JSON list of directories; ratchet submit sets it, with relative names, for a job
_directories: list[str] = []


def find_users_modules(*directories: Path) -> None:
    """Makes modules in the current directory, then those in `directories`, importable here and in roles' processes."""
    import_ratchet_first()  # an editable installation would be asked after the path
    given = os.environ.get(IMPORT_FROM)
    _directories[:] = json.loads(given) if given else [str(directory.absolute()) for directory in directories]
    sys.path.extend(name for name in (str(Path.cwd()), *_directories) if name not in sys.path)


def users_directories() -> Sequence[str]:
    """Where modules are looked for after the current directory."""
    return _directories


def prepare_process() -> None:
    """Called as a role's process begins: Ratchet's packages first, then the user's directories. Ray then puts the
    current directory of the driver first on the path."""
    import_ratchet_first()
    sys.path.extend(json.loads(os.environ.get(IMPORT_FROM, "[]")))
