"""The table of reward source kinds."""

from __future__ import annotations

import pytest

from actors.scoring.kinds import KINDS, kind_of, read_secrets
from common.config.sources import SOURCE_KINDS, HttpSourceConfig, RewardSource


def test_every_kind_that_a_config_may_have_is_in_the_table():
    assert set(KINDS) == set(SOURCE_KINDS.values())


def test_a_source_that_is_no_kind_of_its_own_is_not_in_the_table():
    with pytest.raises(KeyError):
        kind_of(RewardSource(name="s"))


def test_the_keys_of_all_sources_are_read_together(monkeypatch):
    monkeypatch.setenv("KEY_A", "a")
    monkeypatch.setenv("KEY_B", "b")
    sources = [
        HttpSourceConfig(name=name, urls=["http://h"], headers={"X-Api-Key": f"env:KEY_{name}", "X-Tenant": "t"})
        for name in ("A", "B")
    ]
    assert {name: key.get_secret_value() for name, key in read_secrets(sources).items()} == {"KEY_A": "a", "KEY_B": "b"}
