"""What holds for every test."""

from __future__ import annotations

import pytest

from deploy.ending import signals


@pytest.fixture(autouse=True)
def signals_stay_pytests_own(monkeypatch):
    """The command line takes over signals and ends its process: not when a test calls it in this one."""
    monkeypatch.setattr(signals, "catch", lambda: None)
