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


# Files that take longest, longest first. Of the others, those that start Ray or vLLM come first.
LONGEST = [
    f"tests/{name}.py"
    for name in (
        "end_to_end/test_ranks",
        "end_to_end/test_run",
        "chaos/test_chaos",
        "end_to_end/test_submit",
        "durability/test_every_line",
        "end_to_end/test_ends",
        "end_to_end/test_vllm_engine",
        "end_to_end/test_weight_updates",
        "learner/ranks/test_ranks",
        "end_to_end/test_tune",
        "end_to_end/test_agents",
        "end_to_end/test_elastic",
        "end_to_end/test_monitoring",
        "end_to_end/test_vllm_turns",
        "gpu_check/test_gpu_check",
        "end_to_end/test_environments",
        "test_wheel",
        "end_to_end/test_rewards",
        "end_to_end/test_pool",
        "end_to_end/test_hosting",
    )
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several pytest processes, start with the files that take long: the short ones then fill the time at the end.
    In one process the quick tests come first, and fail early."""
    if hasattr(config, "workerinput"):
        place = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: (place.get(file_of(item), len(place)), "ray" not in item.keywords))
    else:
        items.sort(key=lambda item: "ray" in item.keywords)


def file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


@pytest.fixture(autouse=True)
def signals_stay_pytests_own(monkeypatch):
    """The command line takes over signals and ends its process: not when a test calls it in this one."""
    monkeypatch.setattr(signals, "install_handlers", lambda: None)


@pytest.fixture(autouse=True)
def sys_exit_is_pythons_own(monkeypatch):
    """A run of W&B replaces it in the whole process. The traceback of user code that exits would then end in W&B."""
    monkeypatch.setattr(sys, "exit", EXIT)
