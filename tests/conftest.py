"""Applies to every test."""

from __future__ import annotations

import os

# Read when torch is imported. The tests' models are too small for a second thread, which would take the core of the
# other pytest process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from deploy.ending import signals


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several pytest processes, start with the files that take long: the short ones then fill the time at the end.
    In one process the quick tests come first, and fail early."""
    several = hasattr(config, "workerinput")
    items.sort(key=lambda item: ("ray" in item.keywords) != several)


@pytest.fixture(autouse=True)
def signals_stay_pytests_own(monkeypatch):
    """The command line takes over signals and ends its process: not when a test calls it in this one."""
    monkeypatch.setattr(signals, "install_handlers", lambda: None)
