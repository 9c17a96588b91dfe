"""Blocking calls in daemon threads: their results, and that nothing waits for one that never ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from common.daemon_threads import answer, in_daemon_thread

HANGS = """
import asyncio, threading
from common.daemon_threads import answer, in_daemon_thread

async def main():
    try:
        await answer(in_daemon_thread(threading.Event().wait), within_s=0.05)
    except TimeoutError:
        print("gave up", flush=True)

asyncio.run(main())
"""


def test_the_result_of_a_call_comes_back():
    async def scenario() -> int:
        return await answer(in_daemon_thread(divmod, 17, 5), within_s=10)

    assert asyncio.run(scenario()) == (3, 2)


def test_the_error_of_a_call_is_raised():
    async def scenario() -> None:
        await answer(in_daemon_thread(int, "no number"))

    with pytest.raises(ValueError, match="no number"):
        asyncio.run(scenario())


def test_a_late_answer_is_still_there_for_whoever_asks_again():
    release = threading.Event()

    async def scenario() -> str:
        call = in_daemon_thread(lambda: release.wait() and "late")
        with pytest.raises(TimeoutError):
            await answer(call, within_s=0.01)
        release.set()
        return await answer(call, within_s=10)

    assert asyncio.run(scenario()) == "late"


def test_a_process_ends_although_a_call_never_does():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "gave up\n", "")
