"""The names of Ratchet's packages; the user may have packages of the same names. Runs anywhere. Imports only the
standard library."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

RATCHET_PACKAGES = ("actors", "common", "deploy", "learner")


def package_root() -> str:
    """The directory from which Ratchet's packages are imported."""
    return str(Path(__file__).parents[2])


def import_ratchet_first() -> None:
    """Imports Ratchet's packages before the user's directory is added to sys.path. A `common` there would hide
    Ratchet's."""
    for package in RATCHET_PACKAGES:
        import_module(package)


def holds_ratchet(directory: str) -> bool:
    """True if a directory holds Ratchet's packages: those that run here or another copy of them."""
    return all(
        Path(directory, file).exists() for file in ("common/reward_input.py", "actors/scoring/function_worker.py")
    )
