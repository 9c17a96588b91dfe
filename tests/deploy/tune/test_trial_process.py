"""The process of a run: what is left of it when it has ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from deploy.tune.trial_process import TrialProcess

PARENT = """
import os, subprocess, sys
driver = subprocess.Popen(["sleep", "600"])
with open("pids.tmp", "w") as file:
    file.write(f"{os.getpid()} {driver.pid}")
os.rename("pids.tmp", "pids")
driver.wait()
"""


def works(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_driver_whose_parent_was_killed_is_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drivers = []

    def kill_parent():
        if not drivers and Path("pids").exists():
            parent, driver = map(int, Path("pids").read_text().split())
            assert works(driver)
            os.kill(parent, signal.SIGKILL)
            drivers.append(driver)
        return False

    process = TrialProcess(
        tmp_path / "001", [], command=lambda arguments: [sys.executable, "-S", "-c", PARENT], poll_s=0.01
    )
    assert asyncio.run(process.run(kill_parent)) == -signal.SIGKILL
    assert not works(drivers[0])
