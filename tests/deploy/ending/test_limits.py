"""A wait for something that never comes ends: with the message of the first error, and within a limit."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.errors import RoleError, UserError
from deploy.ending import signals
from deploy.ending.ray_errors import errors_shown_first, readable

ROOT = Path(__file__).parents[3]
STUCK = """
import sys, time
from contextlib import ExitStack
from common.errors import RoleError, UserError
from deploy.ending import exit_message, signals
from deploy.ending.limits import limited
from deploy.ending.ray_errors import errors_shown_first

signals.CLEANUP_S = signals._state.cleanup_s = 0.3

def start():
    with limited("the start of the cluster", 0.3):
        time.sleep(60)

def end(error):
    with ExitStack() as ending:
        ending.callback(time.sleep, 60)
        ending.enter_context(errors_shown_first())
        raise error

exit_message.main(lambda: eval(sys.argv[1]))
"""


def stuck(expression: str, tmp_path: Path) -> tuple[int, list[str]]:
    """The exit code and the messages of a command that is stuck for a minute."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-P", "-c", STUCK, expression]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    return done.returncode, done.stderr.splitlines()


def test_a_call_that_does_not_return_ends_the_command(tmp_path):
    code, [message] = stuck("start()", tmp_path)
    assert code == 1
    assert message.startswith("ratchet: the start of the cluster did not end within 0.3 s; details are in ")


@pytest.mark.parametrize(("error", "expected"), [("UserError", 2), ("RoleError", 1)])
def test_an_error_is_shown_before_a_cleanup_that_does_not_end(tmp_path, error, expected):
    code, [message, cut] = stuck(f"end({error}('no room'))", tmp_path)
    assert code == expected
    assert message.startswith("ratchet: no room")
    assert cut == "ratchet: the cleanup did not end within 0.3 s and was cut short"


def test_a_loop_does_not_wait_for_a_thread_that_is_stuck(monkeypatch):
    monkeypatch.setattr(signals, "THREADS_S", 0.05)
    release, ended = threading.Event(), threading.Event()

    def wait():
        release.wait(60)
        ended.set()

    async def main():
        asyncio.get_running_loop().run_in_executor(None, wait)
        return 7

    assert signals.run(main()) == 7
    assert not ended.is_set()
    release.set()
    assert ended.wait(10)


def test_a_loop_waits_for_threads_that_end_by_themselves():
    done = []

    async def main():
        asyncio.get_running_loop().run_in_executor(None, lambda: done.append(1))

    signals.run(main())
    assert done == [1]


def test_the_shown_error_is_the_one_that_is_raised_and_it_is_made_once():
    shown = RoleError("Learner(0) died")
    shown.__cause__ = ValueError("the reason")
    with pytest.raises(RoleError) as raised, errors_shown_first():
        raise shown
    assert raised.value is shown
    assert readable(readable(shown)) is shown
    with pytest.raises(UserError), errors_shown_first():
        raise UserError("prompts.train is missing")
