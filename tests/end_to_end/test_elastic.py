"""A run whose nodes join, are killed and are drained while it trains: elastic_run.py."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from common.files import read_records
from learner.loop.journal import Journal
from tests import small_engine
from tests.fakes import save_tiny_model

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("elastic")
    model = save_tiny_model(directory / "model")
    with open(directory / "output", "w") as output:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("elastic_run.py")), str(model), str(directory)],
            cwd=ROOT,
            env=os.environ | small_engine.variables(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=400)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, (directory / "output").read_text()[-5000:]
    happened = json.loads((directory / "happened.json").read_text())
    assert "error" not in happened, happened["error"] + (directory / "output").read_text()[-5000:]
    return directory / "run", happened


def test_the_pool_followed_the_nodes_that_joined_and_left(finished):
    events = [event for event in read_records(finished[0] / "pool-events.jsonl") if event["role"] == "Generator"]
    assert [event["event"] for event in events] == ["joined", "joined", "joined", "died", "leaving", "left"]
    *joined, died, leaving, left = events
    nodes = {event["replica"]: event["node"] for event in joined}
    assert len(set(nodes.values())) == 3
    assert died["node"] == nodes[died["replica"]]
    assert (leaving["reason"], leaving["node"]) == ("its node is leaving", nodes[leaving["replica"]])
    assert left["replica"] == leaving["replica"]
    assert died["calls"] > 0  # it was generating
    assert not [event for event in read_records(finished[0] / "pool-events.jsonl") if event["role"] != "Generator"][2:]


def test_every_sample_is_in_the_journal_once_or_void_with_its_reason(finished):
    journal = Journal(finished[0] / "journal")
    steps = list(journal.since(0))
    keys = ("epoch", "prompt_index", "replica")
    trained = Counter(
        "/".join(map(str, row)) for s in steps for row in zip(*(s.table[key].to_pylist() for key in keys), strict=True)
    )
    assert set(trained.values()) == {1}
    assert len(trained) == 16 * len(steps)
    state = steps[-1].prompts
    outstanding = sum(end - first for first, end in state["outstanding"])
    void = {sample for s in steps for sample, _ in s.voids} - set(trained)
    assert len(trained) + len(void) + outstanding >= state["issued"]  # a void sample that is asked again counts twice
    assert all(reason for s in steps for _, reason in s.voids)
    for s in steps:
        versions = {version for row in s.table["policy_versions"].to_pylist() for version in row}
        assert versions <= {s.step - 1, s.step}


def test_all_three_generators_wrote_what_was_trained_on(finished):
    steps = Journal(finished[0] / "journal").since(0)
    writers = {name for s in steps for name in s.table["generator"].to_pylist()}
    assert writers == {"Generator(0)", "Generator(1)", "Generator(2)"}


def test_the_run_continued_through_all_of_it(finished):
    records = read_records(finished[0] / "metrics.jsonl")
    # The random policy often writes to the limit of a response, which a health rule reports.
    figures = [value for record in records for key, value in record.items() if key != "health"]
    assert all(math.isfinite(figure) for figure in figures)
    happened = finished[1]
    assert happened["steps when: three generators"] > happened["steps when: started"]  # it trained while they started
    assert len(records) >= happened["steps when: left"] + 2
