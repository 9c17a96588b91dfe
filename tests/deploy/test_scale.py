"""`ratchet scale`: a target reaches the pools of a running run, and the answer is the state of the pools."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import actors.pool.membership as membership
from actors.pool.pool import Pool
from common.config.base import MOST_PROCESSES, Replicated
from common.errors import UserError
from common.files import write_whole
from deploy.run.directory import run_owner, sole_owner
from deploy.run.lock import is_owned
from deploy.scale import _targets, follow_targets, scale, show
from tests.fakes import LocalHost


class Worker:
    def __init__(self, name: str) -> None:
        self.name = name

    async def ready(self) -> str:
        return self.name


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(membership, "TICK_S", 0.01)
    monkeypatch.setattr("deploy.scale._LOOK_EVERY_S", 0.02)


def with_run(directory, ask):
    """Calls `ask()` in a thread while a run with a pool of one to three workers owns the directory."""

    async def run():
        pool = await Pool(LocalHost(Worker), Replicated(min=1, max=3)).start(5)
        pool.members.target = 1
        following = asyncio.create_task(follow_targets(directory, [pool]))
        await asyncio.sleep(0.1)
        try:
            answer = await asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(1), ask)
            return answer, pool.members.target, len(pool.ready)
        finally:
            following.cancel()
            pool.stop()

    with sole_owner(directory):
        return asyncio.run(asyncio.wait_for(run(), 20))


def wait_until(condition, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_target_reaches_the_pool(tmp_path, capsys):
    def ask():
        before = scale(tmp_path, {})
        scale(tmp_path, {"Worker": 2})
        wait_until(lambda: sum(r["state"] == "ready" for r in scale(tmp_path, {})["Worker"]["replicas"]) == 2)
        return before, scale(tmp_path, {})

    (before, after), target, ready = with_run(tmp_path, ask)
    assert (before["Worker"]["target"], after["Worker"]["target"], target, ready) == (1, 2, 2, 2)
    assert [r["name"] for r in after["Worker"]["replicas"]] in (
        ["Worker(0)", "Worker(1)"], ["Worker(0)", "Worker(2)"], ["Worker(1)", "Worker(2)"]
    )  # fmt: skip
    show(after)
    shown = capsys.readouterr().out
    assert "Worker" in shown
    assert "ready" in shown


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"Worker": 0}, "0 Worker replicas are fewer than the run needs"),
        ({"Generator": 2}, "the run has no Generator pool, only Worker"),
        ({"Worker": 10_001}, "more than a run may have"),
    ],
)
def test_impossible_targets_are_refused_and_not_written(tmp_path, targets, message):
    def ask():
        with pytest.raises(UserError, match=message):
            scale(tmp_path, targets)
        return (tmp_path / "scale.json").exists()

    written, target, _ = with_run(tmp_path, ask)
    assert (written, target) == (False, 1)


@pytest.mark.parametrize("text", ["[]", '{"Worker": null}', '{"Worker": Infinity}', '{"Worker": 2.5}', '{"Worker":'])
def test_a_run_survives_a_file_of_targets_that_makes_no_sense(tmp_path, monkeypatch, text):
    refused = threading.Semaphore(0)  # counts the times that the run has read the file in vain

    def counted(directory):
        try:
            return _targets(directory)
        except ValueError:
            refused.release()
            raise

    def ask():
        write_whole(tmp_path / "scale.json", text)
        for _ in range(2):  # the run reads it again after the first time
            assert refused.acquire(timeout=10)
        (tmp_path / "scale.json").unlink()
        return scale(tmp_path, {"Worker": 2})["Worker"]["target"]

    monkeypatch.setattr("deploy.scale._targets", counted)
    assert with_run(tmp_path, ask)[:2] == (2, 2)


def test_a_target_above_the_limit_of_a_role_is_lowered(tmp_path):
    def ask():
        (tmp_path / "scale.json").write_text(f'{{"Worker": {MOST_PROCESSES + 1}}}')
        wait_until(lambda: scale(tmp_path, {})["Worker"]["target"] != 1)

    assert with_run(tmp_path, ask)[1] == MOST_PROCESSES


@pytest.mark.parametrize("text", ["[]", '{"Worker":'])
def test_targets_that_cannot_be_read_are_refused(tmp_path, text):
    def ask():
        (tmp_path / "scale.json").write_text(text)
        with pytest.raises(UserError, match=r"scale\.json cannot be read .*; delete it and ask again"):
            scale(tmp_path, {"Worker": 2})
        return (tmp_path / "scale.json").read_text()

    assert with_run(tmp_path, ask)[:2] == (text, 1)


def test_without_a_running_run_scale_is_refused(tmp_path):
    (tmp_path / "pool-state.json").write_text(json.dumps({"Worker": {"min": 1, "target": 1, "replicas": []}}))
    assert not is_owned(tmp_path)
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no run is in progress in"):
            scale(directory, {"Worker": 2})
    with sole_owner(tmp_path):
        assert is_owned(tmp_path)
        with pytest.raises(UserError, match=r"has not read the target within 0\.1 s"):
            scale(tmp_path, {"Worker": 2}, timeout_s=0.1)  # the process is there and does not listen


def test_a_run_that_continues_is_not_scaled_by_the_state_of_its_killed_driver(tmp_path):
    (tmp_path / "pool-state.json").write_text(json.dumps({"Worker": {"min": 1, "target": 2, "replicas": []}}))
    (tmp_path / "scale.json").write_text('{"Worker": 2}')
    with run_owner(tmp_path, resume=True):  # its pools have not started yet
        for targets in ({"Worker": 2}, {"Worker": 3}, {}):
            with pytest.raises(UserError, match="once its screen says that it is ready"):
                scale(tmp_path, targets)
        assert not (tmp_path / "scale.json").exists()


def test_a_run_without_pools_is_not_scaled(tmp_path):
    with sole_owner(tmp_path), pytest.raises(UserError, match="can be scaled; only ratchet train has some"):
        scale(tmp_path, {"Worker": 2})
