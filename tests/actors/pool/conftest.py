"""Pools that look at their replicas, and replace them, within milliseconds."""

from __future__ import annotations

import pytest

from actors.pool import deaths, membership, pool


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "TICK_S", 0.01)
    monkeypatch.setattr(pool, "TICK_S", 0.01)
    monkeypatch.setattr(deaths, "BACKOFF_S", 0.02)
