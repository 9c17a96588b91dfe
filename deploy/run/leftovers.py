"""Removes files that killed processes of a run left unfinished. Runs in the driver that owns the directory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from learner.loop.checkpoints import COMPLETE

# Temporary files of common.files.write_whole, except those that `ratchet scale` and `ratchet report` may write now.
_STAGING_FILE = re.compile(r"(?!scale\.json|report\.html).+\.\d+\.tmp")
# Directories of common.files.replaced_directory.
_STAGING_DIRECTORY = re.compile(r"\.(policy|adapter|model|critic|best-critic)-\w{8}")
_REPLACED_DIRECTORY = re.compile(r"\.(policy|adapter|model|critic|best-critic)-\w{8}-old")
_CHECKPOINT = re.compile(r"step-\d{6,}")


def clear_scaling_state(directory: Path) -> None:
    """Removes scale.json and pool-state.json of an earlier driver. `ratchet scale` would take them for those of the
    driver that starts now, and it refuses to scale while there is no pool-state.json."""
    for name in ("scale.json", "pool-state.json"):
        (directory / name).unlink(missing_ok=True)


def clear_leftovers(directory: Path) -> None:
    """Removes unfinished files and directories of killed processes, which nobody has read. Keeps links and names that
    Ratchet does not write. A directory that was about to be replaced gets its name back."""
    for path in _entries(directory):
        replaced = _REPLACED_DIRECTORY.fullmatch(path.name)
        if replaced and not os.path.lexists(directory / replaced[1]):
            path.rename(directory / replaced[1])
    for path in _leftovers(directory):
        with suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _leftovers(directory: Path) -> Iterator[Path]:
    for place in (directory, *(directory / name for name in ("errors", "answers", "credit"))):
        for path in _entries(place):
            unfinished = _STAGING_FILE if path.is_file() else _STAGING_DIRECTORY
            if unfinished.fullmatch(path.name) or _REPLACED_DIRECTORY.fullmatch(path.name):
                yield path
    for path in _entries(directory / "checkpoints"):
        if _CHECKPOINT.fullmatch(path.name) and path.is_dir() and not (path / COMPLETE).exists():
            yield path


def _entries(place: Path) -> list[Path]:
    """The entries of a directory that are not links; none if the directory is a link or does not exist."""
    if place.is_symlink() or not place.is_dir():
        return []
    return [path for path in place.iterdir() if not path.is_symlink()]
