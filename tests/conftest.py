"""Applies to every test."""

from __future__ import annotations

import os
import sys

# Read when torch is imported. The tests' models are too small for a second thread, which would take the core of the
# other pytest process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from deploy.ending import signals

EXIT = sys.exit


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several pytest processes, start with the files that take long: the short ones then fill the time at the end.
    In one process the quick tests come first, and fail early."""
    several = hasattr(config, "workerinput")
    items.sort(key=lambda item: ("ray" in item.keywords) != several)


@pytest.fixture(autouse=True)
def signals_stay_pytests_own(monkeypatch):
    """The command line takes over signals and ends its process: not when a test calls it in this one."""
    monkeypatch.setattr(signals, "install_handlers", lambda: None)


@pytest.fixture(autouse=True)
def sys_exit_is_pythons_own(monkeypatch):
    """A run of W&B replaces it in the whole process. The traceback of user code that exits would then end in W&B."""
    monkeypatch.setattr(sys, "exit", EXIT)
