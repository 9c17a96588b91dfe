"""A short run of every fuzzer with fixed seeds. `make fuzz` runs longer, with new seeds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from common.errors import UserError
from tests.fuzz.judge import Hang, WrongAnswer, limited, value_or_message
from tests.fuzz.run import TARGETS, Fuzzer

CASES = {"config": 800, "prompts": 500, "preferences": 400, "replies": 300, "models": 80}


def test_at_least_two_thousand_cases_are_run():
    assert set(CASES) == set(TARGETS)
    assert sum(CASES.values()) >= 2000


@pytest.mark.parametrize("target", TARGETS)
def test_every_odd_input_gives_a_right_value_or_one_message(target, tmp_path):
    fuzzer = Fuzzer(target, tmp_path)
    try:
        failures = [failure for seed in range(CASES[target]) if (failure := fuzzer.run(seed)) is not None]
    finally:
        fuzzer.close()
    assert not failures, "\n\n".join(map(str, failures[:5]))


def test_a_value_or_one_message_is_right(tmp_path):
    def refuse():
        raise UserError("num_steps (0) must be 1 or more; set it")

    assert value_or_message(lambda: 3, tmp_path) == 3
    assert value_or_message(refuse, tmp_path) == "num_steps (0) must be 1 or more; set it"


@pytest.mark.parametrize("message", ["", "  ", "one\n\ntwo", "\nlate", "x" * 10_000, 'File "/a/b.py", line 3, in f'])
def test_an_unreadable_message_is_wrong(tmp_path, message):
    def refuse():
        raise UserError(message)

    with pytest.raises(WrongAnswer):
        value_or_message(refuse, tmp_path)


def test_any_other_exception_a_file_left_behind_and_a_hang_are_wrong(tmp_path):
    with pytest.raises(ZeroDivisionError):
        value_or_message(lambda: 1 / 0, tmp_path)
    with pytest.raises(WrongAnswer, match=r"left behind: .*half\.tmp"):
        value_or_message(lambda: Path(tmp_path / "half.tmp").touch(), tmp_path)
    with pytest.raises(Hang), limited(0.05):
        time.sleep(60)


def test_one_seed_is_one_case(tmp_path):
    def inputs(name: str) -> list[bytes]:
        fuzzer = Fuzzer("config", tmp_path / name)
        found = []
        for seed in range(20):
            fuzzer.run(seed)
            found += [path.read_bytes() for path in sorted((tmp_path / name / "config/scratch").iterdir())]
        return found

    first = inputs("one")
    assert first == inputs("two")
    assert len(set(first)) > 10
