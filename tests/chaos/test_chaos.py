"""A short form of `make chaos`: one synchronous run under `--restarts` in which a scoring replica, a learner rank and
the driver die, and then the cluster's control service and node manager freeze.

Its engine is a small one. `make chaos` has vLLM.
"""

from __future__ import annotations

import json
import random
import re
from collections import deque

import pytest

from common.files import read_records
from tests import small_engine
from tests.chaos import audit
from tests.chaos.run import RESTARTS, RunUnderTest
from tests.chaos.scenarios import NUM_PROMPTS, Blow, Scenario
from tests.fakes import save_tiny_model

pytestmark = pytest.mark.ray

STEPS = 40
SILENCE_S = 8
# Without a generator the run makes no step while its cluster is frozen.
CASES = [
    (Blow("reference", point="measuring"),),
    (Blow("learner", point="swap"),),
    (Blow("driver", point="after the journal"),),
    (Blow("gcs", "STOP"), Blow("generator")),
    (Blow("raylet", "STOP"), Blow("generator")),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The run, and what happened in it."""
    home = tmp_path_factory.mktemp("chaos")
    settings = {
        "sampling": {"max_new_tokens": 12},
        "evaluation": {"every": 1000},
        "ray": {"max_silence_s": SILENCE_S},
    }
    scenario = Scenario("short", CASES, settings)
    cfg = scenario.config(save_tiny_model(home / "model"), seed=0, steps=STEPS)
    (home / "run").mkdir()
    run = RunUnderTest(
        cfg,
        home / "run",
        kind="",
        random_=random.Random(0),
        hang_s=150,
        say=print,
        variables=small_engine.variables(),
    )
    cases = deque(CASES)
    outcome = run.train(cases)
    assert not cases
    return run, outcome


def test_the_run_continues_by_itself_after_every_kill(ended):
    """The processes of a frozen cluster are gone at the end: `RunUnderTest` looks for them."""
    _, outcome = ended
    assert outcome.interventions == outcome.hangs == 0
    assert outcome.faults == []
    assert [kill.reached for kill in outcome.kills] == [True] * sum(map(len, CASES))
    last = [outcome.kills[sum(map(len, CASES[: place + 1])) - 1] for place in range(len(CASES))]
    assert all(kill.recovery_s is not None for kill in last)


def between_restarts(run: RunUnderTest, number: int) -> str:
    """The text before the restart with this number, from the one before on."""
    text = run.output.read_text().partition(f"restart {number - 1} of {RESTARTS}")[2] or run.output.read_text()
    before, found, _ = text.partition(f"restart {number} of {RESTARTS}")
    assert found
    return before


def test_a_killed_driver_is_started_again_with_resume(ended):
    run, _ = ended
    [start] = [line for line in run.output.read_text().splitlines() if f"restart 1 of {RESTARTS}" in line]
    command = f"ratchet train --resume {run.directory}"
    assert start == f"ratchet: the driver was ended by SIGKILL; restart 1 of {RESTARTS}: {command}"
    assert "continue with" not in between_restarts(run, 1)  # its parent does that


def test_a_frozen_control_service_ends_the_driver_with_a_message(ended):
    end = between_restarts(ended[0], 2).rpartition("ratchet: the Ray cluster")[2]
    assert re.search(r" at 127.0.0.1:\d+ has not answered for 8 s \(ray.max_silence_s\); details are in ", end), end


def test_a_frozen_node_manager_ends_the_driver_with_a_message(ended):
    between = between_restarts(ended[0], 3)
    assert re.search(r"ratchet: Ray's node manager \(raylet\) of this machine, 127.0.0.1:\d+, has not ans", between)


def test_nothing_is_lost_and_nothing_is_trained_twice(ended):
    run, _ = ended
    found = audit.examine(run.directory, seed=0, num_prompts=NUM_PROMPTS, max_staleness=0)
    assert found.faults == []
    assert found.lost == found.trained_twice == 0
    assert found.steps == STEPS
    assert found.samples == STEPS * 16


def test_every_step_is_in_the_metrics_once(ended):
    run, _ = ended
    assert [record["step"] for record in read_records(run.directory / "metrics.jsonl")] == list(range(STEPS))
    assert len(json.loads((run.directory / "run.json").read_text())["starts"]) == 4


def test_the_weights_are_those_that_the_journal_gives(ended):
    run, _ = ended
    assert audit.replayed(run.directory, run.environment) == []
