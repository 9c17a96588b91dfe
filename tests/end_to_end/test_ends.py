"""How a real run ends: when a role's process is killed, and when it is told to stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from common.files import read_records
from tests import small_engine
from tests.fakes import save_tiny_model, tiny_config

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def temporary():
    """A run's directory for temporary files. Its path is short, because the paths of Ray's sockets begin with it."""
    directory = Path(tempfile.mkdtemp(prefix="ends-"))
    yield directory
    shutil.rmtree(directory)


def wait_for(what: str, condition: Callable[[], object], process: subprocess.Popen, limit_s: float = 240) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, f"the run ended before: {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"waited {limit_s:g} s for: {what}"
        time.sleep(0.05)


def descendants(ancestor: int) -> dict[int, str]:
    """The command lines of all processes below `ancestor`."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace")
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found - {ancestor}}


def any_process_of(temporary: Path) -> bool:
    """True while a process lives that was started with this directory for temporary files."""
    mark = f"TMPDIR={temporary}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in path.read_bytes():
                return True
    return False


@pytest.fixture(scope="module")
def processes():
    """The processes that the tests start. Any that still lives at the end is killed."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def ends(tmp_path_factory, temporary, processes):
    """A run whose learner is killed as often as is allowed, its continuation under --restarts, which SIGTERM stops, and
    one more, which SIGKILL ends. Returns the run's directory, and for each of the three its exit code, its message and
    the number of steps by then.

    Only the last one has a real engine: its process and temporary files are those that nobody is left to remove."""
    directory = tmp_path_factory.mktemp("ends")
    run, config = directory / "run", directory / "tiny.toml"
    model = save_tiny_model(directory / "model")
    checkpoint = {"every": 1_000_000, "on_signal": True}
    learner = {"precision": "fp32", "max_losses": 1}
    cfg = tiny_config(model, num_steps=1_000_000, checkpoint=checkpoint, learner=learner, evaluation={"prompts": 0})
    config.write_text(cfg.to_toml(), encoding="utf-8")
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def steps() -> int:
        return len(read_records(run / "metrics.jsonl"))

    def started(*arguments: str, **variables: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "deploy.cli", "train", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment | variables, **pipes))
        return processes[-1]

    def ended(process: subprocess.Popen) -> tuple[int, str, int]:
        _, told = process.communicate(timeout=60)
        return process.returncode, told, steps()

    first = started(str(config), "--run", str(run), **small_engine.variables())
    wait_for("two steps", lambda: steps() >= 2, first)
    [learner] = [pid for pid, name in descendants(first.pid).items() if name.startswith("ray::Learner")]
    os.kill(learner, signal.SIGKILL)
    killed = ended(first)
    second = started("--resume", str(run), "--restarts", "9", **small_engine.variables())
    wait_for("two more steps", lambda: steps() >= killed[2] + 2, second)
    second.send_signal(signal.SIGTERM)
    stopped = ended(second)
    assert list(temporary.iterdir()) == []
    assert not any_process_of(temporary)
    third = started("--resume", str(run))
    wait_for("one more step", lambda: steps() > stopped[2], third)
    third.send_signal(signal.SIGKILL)
    return run, killed, stopped, ended(third)


def test_a_learner_killed_too_often_ends_the_run_with_one_message(ends):
    _, (code, told, _), *_ = ends
    assert code == 1
    assert told.count("\n") == 1, told
    assert told.startswith("ratchet: the learner lost ranks 1 times")
    assert "Learner(0) died" in told
    assert "continue with --resume" in told


def test_sigterm_stops_a_run_and_its_parent_like_ctrl_c(ends):
    """It leaves nothing: `ends` looks."""
    run, _, (code, told, _), _ = ends
    assert code == 143
    assert told == f"ratchet: stopped by SIGTERM; continue with ratchet train --resume {run}\n"


def test_a_signal_writes_a_checkpoint_of_the_last_step_where_wanted(ends):
    run, _, (_, _, steps), _ = ends
    assert (run / f"checkpoints/step-{steps:06d}/COMPLETE").exists()


def test_a_killed_driver_leaves_a_message_too(ends):
    run, _, _, (code, told, _) = ends
    assert code == -signal.SIGKILL
    assert told.count("\n") == 1, told
    assert told.endswith(f"had died; continue with ratchet train --resume {run}\n")


def test_no_end_leaves_temporary_files_or_a_process(ends, temporary):
    assert [path.name for path in temporary.iterdir()] == []
    assert not any_process_of(temporary)
