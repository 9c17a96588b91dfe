"""The harness itself: it reaches its points, finds its processes, and its audit finds what is wrong."""

from __future__ import annotations

import functools
import importlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from common.experience_table import experience_table
from common.types import Experience, Prompt, SampleId
from learner.loop.journal import Journal
from tests.chaos import points
from tests.chaos.audit import entries, examine
from tests.chaos.processes import Marked, of_role, read
from tests.chaos.results import Kill, Outcome, summarise
from tests.chaos.run import LAST
from tests.chaos.scenarios import ALL, SCENARIOS, schedule, shares
from tests.fakes import make_experience

# Points


@pytest.mark.parametrize("title", points.POINTS)
def test_every_point_is_a_function_of_the_product(title):
    point = points.POINTS[title]
    assert callable(functools.reduce(getattr, point.function.split("."), importlib.import_module(point.module)))


def test_every_point_is_used_by_a_case():
    used = {blow.point for scenario in SCENARIOS.values() for case in scenario.cases for blow in case}
    assert (used | {LAST.point}) - {""} == set(points.POINTS)


def test_a_process_waits_at_an_armed_point_until_it_is_released(tmp_path, monkeypatch):
    monkeypatch.setenv("CHAOS_POINTS", str(tmp_path))
    (tmp_path / "armed").write_text("update")
    points.reach("swap")  # another point: does not wait
    assert (tmp_path / "armed").exists()
    waiting = threading.Thread(target=points.reach, args=("update",))
    waiting.start()
    reached = tmp_path / f"reached-{os.getpid()}"
    wait_until(reached.exists)
    assert not (tmp_path / "armed").exists()
    points.reach("update")  # only the first one waits
    assert waiting.is_alive()
    reached.unlink()
    waiting.join(10)
    assert not waiting.is_alive()


def test_points_are_wrapped_in_every_process_that_has_the_site_directory(tmp_path):
    root = Path(points.__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}:{root / 'tests/site'}",
        "CHAOS_POINTS": str(tmp_path),
    }
    code = "from learner.loop.journal import Journal; print(Journal.append.__wrapped__.__qualname__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "Journal.append\n", done.stderr


def wait_until(condition, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Processes


def test_a_process_without_the_mark_is_found_by_descent_and_remembered(tmp_path):
    mark = f"test-{os.getpid()}"
    command = f"env -u CHAOS_MARK sleep 600 & echo $! > {tmp_path}/pid; wait"
    parent = subprocess.Popen(["sh", "-c", command], env={**os.environ, "CHAOS_MARK": mark})
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
        child = int((tmp_path / "pid").read_text())
        wait_until(lambda: read(child).command == "sleep 600")
        marked = Marked(mark)
        assert {process.pid for process in marked.look()} == {parent.pid, child}
        parent.kill()
        parent.wait()
        assert [process.pid for process in marked.look()] == [child]
    finally:
        parent.kill()
        marked.kill()
    assert marked.look() == []


def test_a_signal_reaches_no_other_process_with_the_same_id():
    sleeping = subprocess.Popen(["sleep", "600"])
    found = read(sleeping.pid)
    older = type(found)(found.pid, found.parent, found.began - 1, found.command, found.state)
    assert not older.send(signal.SIGKILL)
    assert found.send(signal.SIGKILL)
    assert sleeping.wait() == -signal.SIGKILL
    assert of_role([found], "generator", 0) == []


# Schedule


def test_a_schedule_has_every_case_before_it_has_one_twice():
    blows = sum(map(len, ALL))
    cases = schedule(ALL, blows, random.Random(0))
    assert Counter(cases) == Counter(ALL)
    assert cases == schedule(ALL, blows, random.Random(0))
    assert cases != schedule(ALL, blows, random.Random(1))


@pytest.mark.parametrize("kills", [1, 7, 200])
def test_the_kills_are_shared_out_whole(kills):
    given = shares(list(SCENARIOS), kills)
    assert sum(given.values()) == kills
    assert all(sum(map(len, schedule(ALL, share, random.Random(0)))) == share for share in given.values())


# Audit

ORDER = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]  # numpy.random.default_rng([0, 0]).permutation(10)


def row(index: int, version: int) -> Experience:
    made = make_experience(index, [5, 6, 1], version=version)
    prompt = Prompt(SampleId(0, ORDER[index], 0), f"prompt {index}", made.rollout.prompt.token_ids, {})
    object.__setattr__(made.rollout, "prompt", prompt)
    return made


def journal_of(directory: Path, *steps: list[int], issued: int, outstanding: list[list[int]], late: int = 0) -> Path:
    """A run whose steps have the samples with these numbers; the tokens are `late` versions old."""
    journal = Journal(directory / "journal")
    if hasattr(journal, "open_for_writing"):
        journal.open_for_writing()
    for step, numbers in enumerate(steps):
        table = experience_table([row(number, step - late) for number in numbers], step=step, decode=None)
        prompts = {"prompts_hash": "", "issued": issued, "outstanding": outstanding}
        journal.append(table, policy_version=step, prompts=prompts)
    return directory


def found(run: Path) -> tuple[int, int, list[str]]:
    findings = examine(run, seed=0, num_prompts=10, max_staleness=0)
    return findings.lost, findings.trained_twice, findings.faults


def test_a_whole_journal_has_no_fault(tmp_path):
    run = journal_of(tmp_path, [0, 1], [2, 4], issued=6, outstanding=[[3, 4], [5, 6]])
    assert found(run) == (0, 0, [])


def test_a_sample_that_is_settled_but_nowhere_is_lost(tmp_path):
    run = journal_of(tmp_path, [0, 1], [2, 4], issued=6, outstanding=[[5, 6]])
    assert found(run) == (1, 0, [f"lost: ['0/{ORDER[3]}/0']"])


def test_a_sample_in_two_steps_is_trained_twice(tmp_path):
    run = journal_of(tmp_path, [0, 1], [1, 2], issued=3, outstanding=[])
    assert found(run) == (0, 1, [f"trained twice: ['0/{ORDER[1]}/0']"])


def test_a_token_of_a_wrong_version_is_a_fault(tmp_path):
    run = journal_of(tmp_path, [0], [1], issued=2, outstanding=[], late=1)
    assert found(run)[2] == [
        "step-000000.arrow has tokens of versions -1 to -1",
        "step-000001.arrow has tokens of versions 0 to 0",
    ]


def test_a_changed_file_breaks_the_chain(tmp_path):
    run = journal_of(tmp_path / "one", [0], [1], issued=2, outstanding=[])
    other = journal_of(tmp_path / "other", [0], [1], issued=2, outstanding=[])
    os.replace(entries(other)[-2][1], entries(run)[-2][1])
    assert found(run)[2] == [
        "step-000000.arrow is not the next link of the chain",
        "step-000001.arrow is not the next link of the chain",
    ]


# Results


def test_recovery_seconds_are_given_by_role():
    kills = [Kill("learner", "KILL", "", 3, recovery_s=seconds) for seconds in (4.0, 9.0, 5.0)]
    kills += [Kill("learner", "STOP", "swap", 3, reached=False, recovery_s=20.0), Kill("driver", "KILL", "", 4)]
    summary = summarise([Outcome(kills, interventions=1)], [], seed=0)
    assert summary["kills"] == 5
    assert summary["interventions"] == 1
    assert summary["recovery_s"] == {
        "learner": {"count": 3, "min": 4.0, "median": 5.0, "max": 9.0},
        "learner frozen": {"count": 1, "min": 20.0, "median": 20.0, "max": 20.0},
    }
    assert summary["points_missed"] == {"swap": 1}
