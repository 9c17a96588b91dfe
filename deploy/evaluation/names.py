"""The names of the policies on the command line of `ratchet evaluate`.

Runs in the driver, before anything slow is imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from shlex import quote

from common.config.loading import absolute_if_directory
from common.errors import UserError

BASE = "base"  # the name of model.path
_LETTERS = "A-Za-z0-9._-"


def policy_names(policies: Sequence[str]) -> dict[str, str]:
    """The absolute path of each policy by its name. `policies`: PATH or NAME=PATH. Without NAME, the name is the last
    part of the path, or the fewest last parts that make all names different: runs/a/policy and runs/b/policy are
    a-policy and b-policy. Raises UserError."""
    given = [_split(policy) for policy in policies]
    parts = [PurePath(path).parts for name, path in given if not name]
    longest = max(map(len, parts), default=1)
    count = next((n for n in range(1, longest) if len({part[-n:] for part in parts}) == len(parts)), longest)
    named: dict[str, str] = {}
    for name, path in given:
        if path in named.values():
            raise UserError(f"--policy {path} is given twice; leave one out")
        name = name or _as_name("-".join(PurePath(path).parts[-count:]))
        if name in named or name == BASE:
            taken = "that of model.path" if name == BASE else f"also that of {named[name]}"
            raise UserError(f"--policy {path}: its name {name} is {taken}; choose one: --policy NAME={quote(path)}")
        named[name] = path
    return named


def _split(policy: str) -> tuple[str, str]:
    """NAME, "" if there is none, and the path. A directory with "=" in its name needs no NAME."""
    name, equals, path = policy.partition("=")
    if not equals or Path(policy).expanduser().is_dir():
        return "", absolute_if_directory(policy)
    if not re.fullmatch(f"[{_LETTERS}]+", name) or name.startswith("."):
        raise UserError(f"--policy {policy}: its name ({name}) may have letters, digits, dots, dashes and underscores")
    return name, absolute_if_directory(path)


def _as_name(text: str) -> str:
    """The text as a part of file names."""
    return re.sub(f"[^{_LETTERS}]+", "-", text).strip("-.") or "policy"
