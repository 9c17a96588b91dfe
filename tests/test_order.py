"""The order of the test files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from tests.conftest import LONGEST, pytest_collection_modifyitems

ROOT = Path(__file__).parents[1]


def items(*tests: tuple[str, bool]) -> list[SimpleNamespace]:
    return [SimpleNamespace(nodeid=name, keywords={"ray"} if ray else set()) for name, ray in tests]


TESTS = [("tests/test_a.py::test_1", False), ("tests/test_b.py::test_2", True), (f"{LONGEST[1]}::test_3", True)]
TESTS += [(f"{LONGEST[0]}::test_4", True), (f"{LONGEST[0]}::test_5", True), ("tests/test_c.py::test_6", False)]


def test_of_several_processes_each_starts_with_the_longest_files():
    found = items(*TESTS)
    pytest_collection_modifyitems(SimpleNamespace(workerinput={}), found)
    assert [item.nodeid[-1] for item in found] == ["4", "5", "3", "2", "1", "6"]


def test_one_process_starts_with_quick_tests():
    found = items(*TESTS)
    pytest_collection_modifyitems(SimpleNamespace(), found)
    assert [item.nodeid[-1] for item in found] == ["1", "6", "2", "3", "4", "5"]


def test_every_file_of_the_order_exists_once():
    assert [name for name in LONGEST if not (ROOT / name).exists()] == []
    assert len(set(LONGEST)) == len(LONGEST)
