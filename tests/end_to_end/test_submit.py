"""Runs on a cluster that is already running: sent as jobs from a user's own directory, or joined by the driver."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from learner.loop.journal import Journal
from tests.fakes import save_tiny_model, tiny_config

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SECOND_NODE = """
import sys
from ray._private.node import Node
from ray._private.parameter import RayParams
node = Node(
    RayParams(
        gcs_address=sys.argv[1],
        temp_dir=sys.argv[2],  # with a shared one, each node would delete packages that the other uses
        node_ip_address="127.0.0.1",
        num_cpus=1,
        object_store_memory=200 << 20,
        min_worker_port=0,
        max_worker_port=0,
        node_manager_port=0,
        dashboard_agent_listen_port=None,
    ),
    head=False,
    shutdown_at_exit=True,
)
print("started", flush=True)
sys.stdin.read()  # returns when the tests end, also when they are killed
node.kill_all_processes(check_alive=False, allow_graceful=True)
"""
# Its arguments: the cluster's address, a run directory; the number of a process whose existence is told.
DRIVER = """
import os, sys, time
from pathlib import Path
import ray
from common.config.base import RayConfig
from deploy.cluster.connection import cluster

@ray.remote(num_cpus=0)
class Role:
    def pid(self):
        return os.getpid()

with cluster(RayConfig(address=sys.argv[1]), Path(sys.argv[2])):
    if len(sys.argv) > 3:
        print("alive" if Path("/proc", sys.argv[3]).exists() else "gone", flush=True)
    else:
        role = Role.remote()
        print(ray.get(role.pid.remote()), flush=True)
        time.sleep(600)
"""
REWARD = """
from pathlib import Path

import ray

import common.types
from common.types import RewardInput

if ray.is_initialized():  # only in a reward replica, which imports this module when it starts
    note = Path({notes!r}) / ray.get_runtime_context().get_node_id()
    note.write_text(common.types.__file__)


def a_words(answer: RewardInput) -> float:
    words = answer.response.split()
    return sum(word.startswith("a") for word in words) / max(1, len(words))
"""


@dataclass(frozen=True)
class RunningCluster:
    address: str
    dashboard: str
    environment: dict[str, str]

    @property
    def token(self) -> str:
        return self.environment["RAY_AUTH_TOKEN"]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """`ray start --head` and a second node, of one core each, on loopback, with a token and a dashboard."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {
        "PATH": "/usr/bin:/bin",  # no activated environment: jobs must find the interpreter without it
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray then keeps 127.0.0.1 and listens only there
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    # The paths of Ray's sockets must be short; pytest's directories are too long.
    temp = Path("/tmp") / f"ratchet-{secrets.token_hex(3)}"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        dashboard = f"127.0.0.1:{probe.getsockname()[1]}"
    host, _, port = dashboard.partition(":")
    start = partial(subprocess.Popen, env=environment, text=True, stderr=subprocess.DEVNULL, start_new_session=True)
    head = start(
        [
            *(
                str(Path(sys.executable).with_name("ray")),
                "start",
                "--head",
                "--block",
                "--node-ip-address=127.0.0.1",
                "--port=0",
                "--num-cpus=1",
                "--dashboard-agent-listen-port=0",  # any: the default may be that of another cluster, even a dying one
            ),
            *(f"--dashboard-host={host}", f"--dashboard-port={port}", f"--object-store-memory={200 << 20}"),
            f"--temp-dir={temp}/1",
        ],
        stdout=subprocess.PIPE,
    )
    processes = [head]
    try:
        assert any("Ray runtime started" in line for line in head.stdout)
        while not (written := temp / "1/ray_current_cluster").exists():
            assert head.poll() is None
            time.sleep(0.1)
        address = written.read_text()
        # `ray start --address` refuses to run with RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0.
        second = start(
            [sys.executable, "-c", SECOND_NODE, address, f"{temp}/2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        processes.append(second)
        assert second.stdout.readline() == "started\n"
        yield RunningCluster(address, f"http://{dashboard}", environment)
        second.stdin.close()
        second.wait(timeout=30)
        head.terminate()
        head.wait(timeout=30)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(model, tmp_path):
    """A user's directory: prompts, a reward function, a config, and modules with the names of our packages."""
    place, notes = tmp_path / "user", tmp_path / "notes"
    place.mkdir()
    notes.mkdir()
    (place / "my_rewards.py").write_text(REWARD.format(notes=str(notes)))
    (place / ".gitignore").write_text("ignored.jsonl\n")
    for name in ("actors", "common", "deploy", "learner"):
        (place / f"{name}.py").write_text("raise ImportError('a module named like one of our packages')\n")
    for name in ("prompts.jsonl", "ignored.jsonl"):
        (place / name).write_text("".join(json.dumps({"prompt": f"ask a{i}"}) + "\n" for i in range(8)))
    cfg = tiny_config(
        model,
        num_steps=2,
        prompts={"train": "prompts.jsonl", "heldout": None, "max_tokens": 8},
        evaluation={"prompts": 0},
        # Each of the two replicas takes a whole core, so each node gets one of them.
        generators={"cpus": 0},
        learner={"cpus": 0},
        reward={"sources": [{"name": "a_words", "function": "my_rewards:a_words"}], "min": 2, "cpus": 1},
    )
    (place / "tiny.toml").write_text(cfg.to_toml())
    return place


def notes(place) -> list[str]:
    """For each node with a reward replica: the file from which it imported common.types."""
    return [note.read_text() for note in place.with_name("notes").iterdir()]


def ratchet(place, environment, *arguments):
    """Runs the command line in the user's directory, with the project imported from elsewhere."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "deploy.cli", *arguments],
        cwd=place,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_a_submitted_run_trains_on_every_node_with_the_uploaded_code(running, place, tmp_path):
    run = tmp_path / "run"
    done = ratchet(
        place, running.environment, "submit", "tiny.toml", "seed=3", "--address", running.dashboard, "--run", run
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run directory on the cluster: {run}" in done.stdout
    assert "ready after" in done.stdout  # the job's log
    journal = Journal(run / "journal")
    assert journal.next_step == 2
    assert [step.table.num_rows for step in journal.since(0)] == [4, 4]
    assert "seed = 3" in (run / "config.toml").read_text()
    assert len(notes(place)) == 2  # nodes
    jobs = Request(f"{running.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {running.token}"})
    with urlopen(jobs) as answer:
        shown = answer.read().decode()
    assert str(run) in shown
    assert "seed" not in shown  # the config is in no job's metadata
    assert "a_words" not in shown
    assert all("_ray_pkg_" in file for file in notes(place))  # neither the user's `common` nor an installed one


def test_a_job_that_fails_gives_its_exit_code(running, place, tmp_path):
    done = ratchet(
        place,
        running.environment,
        *("submit", "tiny.toml", "model.path=nowhere/to-be-found", "--run", tmp_path / "run"),
        *("--address", running.dashboard),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "nowhere/to-be-found" in done.stdout.partition("submitted")[2]
    assert not (tmp_path / "run").exists()


def test_a_run_that_joined_the_named_cluster_resumes_there_as_a_job(running, place, tmp_path):
    run = tmp_path / "run"
    joined = {**running.environment, "RAY_ADDRESS": "127.0.0.1:9"}  # --address overrides it
    done = ratchet(place, joined, "train", "tiny.toml", "num_steps=1", "--address", running.address, "--run", run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'address = "{running.address}"' in (run / "config.toml").read_text()
    assert notes(place) == 2 * [str(ROOT / "common/types.py")]
    done = ratchet(place, joined, "submit", "num_steps=2", "--resume", run, "--address", running.dashboard, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert Journal(run / "journal").next_step == 2


def test_a_submitted_run_whose_driver_is_killed_continues(running, place, tmp_path):
    run = tmp_path / "run"
    options = ("--address", running.dashboard, "--run", str(run))
    submitted = subprocess.Popen(
        [sys.executable, "-P", "-m", "deploy.cli", "submit", "tiny.toml", "num_steps=5", *options],
        cwd=place,
        env={**running.environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 150
    while not (run / "journal/step-000001.arrow").exists():
        assert submitted.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [driver] = processes_with("train", str(run))
    os.kill(driver, signal.SIGKILL)
    told, _ = submitted.communicate(timeout=180)
    assert submitted.returncode == 0, told
    assert f"restart 1 of 3: ratchet train --resume {run}" in told
    assert Journal(run / "journal").next_step == 5
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2


def processes_with(*arguments: str) -> list[int]:
    """The Python processes with these arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            given = path.read_bytes().decode(errors="replace").split("\0")
            if "-m" in given and set(arguments) <= set(given):
                found.append(int(path.parent.name))
    return found


def test_processes_of_a_dead_driver_are_gone_before_the_next_one_begins(running, tmp_path):
    def driver(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-P", "-c", DRIVER, running.address, str(tmp_path / "run"), *arguments]
        environment = {**running.environment, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    first = driver()
    role = int(first.stdout.readline())
    os.kill(role, signal.SIGSTOP)  # Ray asks it to end, and waits 5 s before it kills it
    first.kill()
    first.communicate()
    second = driver(str(role))
    told, _ = second.communicate(timeout=120)
    assert (second.returncode, told) == (0, "gone\n")


@pytest.mark.parametrize("token", [None, "f" * 64])
@pytest.mark.parametrize("command", ["train", "submit"])
def test_without_the_token_a_run_is_refused(running, place, tmp_path, command, token):
    environment = {**running.environment, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token" if token else "disabled"}
    environment["RAY_AUTH_TOKEN"] = token or ""
    address = running.address if command == "train" else running.dashboard
    done = ratchet(place, environment, command, "tiny.toml", "--address", address, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert f"{address}" in done.stderr
    assert "asks for authentication, and the token here is missing or wrong" in done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
