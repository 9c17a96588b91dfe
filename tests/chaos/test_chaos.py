"""A short form of `make chaos`: one synchronous run in which a scoring replica, a learner rank and the driver die."""

from __future__ import annotations

import random
from collections import deque

import pytest

from tests.chaos import audit
from tests.chaos.run import RunUnderTest
from tests.chaos.scenarios import NUM_PROMPTS, Blow, Scenario
from tests.fakes import save_tiny_model

pytestmark = pytest.mark.ray

CASES = [
    (Blow("reference", point="measuring"),),
    (Blow("learner", point="swap"),),
    (Blow("driver", point="after the journal"),),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The run, and what happened in it."""
    home = tmp_path_factory.mktemp("chaos")
    cfg = Scenario("short", CASES).config(save_tiny_model(home / "model"), seed=0, steps=40)
    (home / "run").mkdir()
    run = RunUnderTest(cfg, home / "run", kind="", random_=random.Random(0), hang_s=150, say=print)
    cases = deque(CASES)
    outcome = run.train(cases)
    assert not cases
    return run, outcome


def test_the_run_continues_by_itself_after_every_kill(ended):
    _, outcome = ended
    assert outcome.interventions == outcome.hangs == 0
    assert outcome.faults == []
    assert [kill.reached for kill in outcome.kills] == [True] * len(CASES)
    assert all(kill.recovery_s is not None for kill in outcome.kills)


def test_nothing_is_lost_and_nothing_is_trained_twice(ended):
    run, _ = ended
    found = audit.examine(run.directory, seed=0, num_prompts=NUM_PROMPTS, max_staleness=0)
    assert found.faults == []
    assert found.lost == found.trained_twice == 0
    assert found.steps == 40
    assert found.samples == 40 * 16


def test_the_weights_are_those_that_the_journal_gives(ended):
    run, _ = ended
    assert audit.replayed(run.directory, run.environment) == []
