"""The delay before a replacement, and the deaths that end a run."""

from __future__ import annotations

import math

import pytest

from actors.pool import deaths
from actors.pool.deaths import Deaths


@pytest.fixture
def clock(monkeypatch):
    """Time stands still at 1000 s, with the product's own delays."""
    monkeypatch.setattr(deaths.time, "monotonic", lambda: 1000.0)
    monkeypatch.setattr(deaths, "BACKOFF_S", 1.0)


def delay(record: Deaths, *, served_s: float = 0.0) -> float:
    record.record(ValueError("a cause"), began=math.inf, served_s=served_s, tried_alone=False)
    return record.wait_until - 1000.0


def test_the_delay_doubles_up_to_a_minute(clock):
    record = Deaths()
    assert [delay(record) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_the_delay_starts_again_after_a_minute_of_service(clock):
    record = Deaths()
    assert [delay(record), delay(record), delay(record, served_s=59), delay(record, served_s=61)] == [1, 2, 4, 1]


def too_many(causes: list[str], *, alone: tuple[int, ...] = (), record: Deaths | None = None) -> list[bool]:
    """The answers to deaths one after the other: each replica begins after the last death."""
    record = record or Deaths()
    return [
        record.record(ValueError(cause), began=math.inf, served_s=0.0, tried_alone=number in alone)
        for number, cause in enumerate(causes)
    ]


def test_the_third_death_of_one_cause_is_one_too_many():
    assert too_many(["pid 17 at 0x7fa1", "pid 4 at 0x7fb2", "pid 5 at 0x7fc3"]) == [False, False, True]


def test_another_cause_starts_the_count_again():
    assert too_many(["killed", "killed", "out of memory", "killed", "killed"]) == [False] * 5


def test_only_the_first_death_of_a_call_tried_alone_is_blamed_on_the_call():
    assert too_many(["broken"] * 4, alone=(2, 3)) == [False, False, False, True]


def test_an_answered_call_starts_the_count_again():
    record = Deaths()
    for _ in range(5):
        assert too_many(["killed"] * 2, record=record) == [False, False]
        record.forget()


def test_deaths_of_replicas_that_ran_at_the_same_time_count_as_one(clock):
    record = Deaths()
    for generation in range(3):
        answers = [
            record.record(ValueError("killed"), began=1000.0 if number == 0 else 999.0, served_s=0.0, tried_alone=False)
            for number in range(8)
        ]
        assert answers == [generation == 2] + [False] * 7
        assert record.wait_until - 1000.0 == 2**generation


def test_replicas_that_die_in_turn_end_the_run(monkeypatch):
    # While one begins, the other still runs. Each line: when it began, when it died, and whether that ends the run.
    lives = [(0, 10, False), (5, 15, False), (11, 21, False), (16, 26, False), (22, 32, True)]
    record = Deaths()
    for began, died, ends in lives:
        monkeypatch.setattr(deaths.time, "monotonic", lambda died=died: float(died))
        assert record.record(ValueError("killed"), began=began, served_s=0.0, tried_alone=False) is ends
