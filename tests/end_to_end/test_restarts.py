"""A real run under `--restarts`: its driver is killed, its cluster freezes, and it continues by itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from common.files import read_records
from learner.loop.journal import Journal
from tests.fakes import save_tiny_model, tiny_config

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SILENCE_S = 8


def descendants(ancestor: int) -> dict[int, str]:
    """The command lines of all processes below `ancestor`."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found - {ancestor}}


class SupervisedRun:
    """`ratchet train --restarts 9` in its own process."""

    def __init__(self, directory: Path, temporary: Path) -> None:
        model, config = save_tiny_model(directory / "model"), directory / "tiny.toml"
        cfg = tiny_config(model, num_steps=1_000_000, checkpoint={"every": 50}, evaluation={"prompts": 0})
        config.write_text(cfg.to_toml(), encoding="utf-8")
        self.run = directory / "run"
        environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "deploy.cli", "train", str(config), "--run", str(self.run), "--restarts", "9"]
        self.told = directory / "told.txt"
        with open(self.told, "w") as told:
            self.process = subprocess.Popen(
                [*command, f"ray.max_silence_s={SILENCE_S}"], cwd=ROOT, env=environment, stderr=told, stdout=told
            )

    def pid(self, name: str) -> int:
        """The first process of the run whose command line has `name`."""
        return min(pid for pid, command in descendants(self.process.pid).items() if name in command)

    @property
    def steps(self) -> int:
        return len(read_records(self.run / "metrics.jsonl"))

    def wait_for(self, what: str, condition, limit_s: float = 240) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, f"the run ended before: {what}: {self.told.read_text()}"
            assert time.monotonic() < deadline, f"waited {limit_s:g} s for: {what}: {self.told.read_text()}"
            time.sleep(0.05)

    def wait_for_steps(self, restart: int) -> None:
        """Waits for the restart with this number, and for two steps after it."""
        self.wait_for(f"restart {restart}", lambda: f"restart {restart} of 9" in self.told.read_text())
        before = self.steps
        self.wait_for(f"two steps after restart {restart}", lambda: self.steps >= before + 2)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The run's directory, what it told, its exit code after SIGTERM, and what it has left behind."""
    temporary = Path(tempfile.mkdtemp(prefix="restarts-"))  # short, because the paths of Ray's sockets begin with it
    supervised = SupervisedRun(tmp_path_factory.mktemp("restarts"), temporary)
    try:
        supervised.wait_for("two steps", lambda: supervised.steps >= 2)
        os.kill(supervised.pid("deploy.cli"), signal.SIGKILL)
        supervised.wait_for_steps(1)
        for restart, name in ((2, "gcs_server"), (3, "raylet/raylet")):
            os.kill(supervised.pid(name), signal.SIGSTOP)
            os.kill(supervised.pid("ray::Generator"), signal.SIGKILL)
            supervised.wait_for_steps(restart)
        supervised.process.send_signal(signal.SIGTERM)
        code = supervised.process.wait(timeout=60)
        left = [path.name for path in temporary.iterdir()], descendants(supervised.process.pid)
        yield supervised.run, supervised.told.read_text(), code, left
    finally:
        for pid in (*descendants(supervised.process.pid), supervised.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        supervised.process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def test_a_killed_driver_is_started_again_with_resume(told):
    run, text, *_ = told
    [start] = [line for line in text.splitlines() if "restart 1 of 9" in line]
    assert start == f"ratchet: the driver was ended by SIGKILL; restart 1 of 9: ratchet train --resume {run}"
    assert "continue with" not in text.partition("restart 2 of 9")[0].partition(start)[0]  # its parent does that


def test_a_frozen_control_service_ends_the_driver_with_a_message(told):
    *_, end = (
        told[1].partition("restart 1 of 9")[2].partition("restart 2 of 9")[0].rpartition("ratchet: the Ray cluster")
    )
    assert re.search(r" at 127.0.0.1:\d+ has not answered for 8 s \(ray.max_silence_s\); details are in ", end), end


def test_a_frozen_node_manager_ends_the_driver_with_a_message(told):
    between = told[1].partition("restart 2 of 9")[2].partition("restart 3 of 9")[0]
    assert re.search(r"ratchet: Ray's node manager \(raylet\) of this machine, 127.0.0.1:\d+, has not ans", between)


def test_sigterm_ends_driver_and_parent_and_leaves_nothing(told):
    _, text, code, left = told
    assert code == 143
    assert (
        text.rstrip().splitlines()[-1].startswith("ratchet: stopped by SIGTERM; continue with ratchet train --resume")
    )
    assert left == ([], {})


def test_every_step_is_in_the_journal_and_the_metrics_once(told):
    run, *_ = told
    journal = Journal(run / "journal")
    journal.verify()
    steps = [record["step"] for record in read_records(run / "metrics.jsonl")]
    assert sorted(set(steps)) == steps
    assert journal.next_step - len(steps) in (0, 1)  # a step may be on disk that nobody has learned from
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 4
