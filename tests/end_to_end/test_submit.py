"""Runs that are sent as jobs from a user's own directory, to a cluster that is already running.

Its head is started with a token. A real autoscaler adds and removes the nodes of generators, whose engines are small
ones.
"""

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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from common.files import read_records
from tests import small_engine
from tests.chaos import audit
from tests.end_to_end import fake_nodes
from tests.fakes import save_tiny_model, tiny_config

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
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
# A score waits until the next step is allowed, so the run makes no step while the test changes the cluster.
REWARD = """
import time
from pathlib import Path

import ray

import common.types
from common.types import RewardInput

if ray.is_initialized():  # only in a reward replica, which imports this module when it starts
    Path({runs!r}, "imported").write_text(common.types.__file__)


def a_words(answer: RewardInput) -> float:
    while len(list(Path({runs!r}, "story/journal").glob("step-*.arrow"))) >= int(Path({runs!r}, "allowed").read_text()):
        time.sleep(0.05)
    words = answer.response.split()
    return sum(word.startswith("a") for word in words) / max(1, len(words))
"""
ON_HEAD = {"labels": {"group": "head"}}
STEPS = 6
LIMIT_S = 240
UNPACKED = "*/session_2*/runtime_resources/py_modules_files/*/actors"  # in the directories of the nodes


@dataclass(frozen=True)
class RunningCluster:
    address: str
    dashboard: str
    environment: dict[str, str]
    directory: Path

    @property
    def token(self) -> str:
        return self.environment["RAY_AUTH_TOKEN"]

    def ask(self, path: str) -> Any:
        """An answer of the dashboard."""
        request = Request(f"{self.dashboard}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urlopen(request) as answer:
            return json.load(answer)

    def nodes(self) -> set[str]:
        """The living nodes without the head."""
        nodes = self.ask("/api/v0/nodes")["data"]["result"]["result"]
        return {node["node_id"] for node in nodes if node["state"] == "ALIVE" and not node["is_head_node"]}

    def drain_node(self, node: str) -> None:
        """Tells Ray that the node will be gone in a minute, as for a spot machine that is taken back."""
        subprocess.run(
            [
                *(Path(sys.executable).with_name("ray"), "drain-node", "--address", self.address, "--node-id", node),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"),
                *("--deadline-remaining-seconds", "60"),
            ],
            env=self.environment,
            check=True,
        )

    def kill_node(self, node: str) -> None:
        """Kills the node's raylet with SIGKILL. Its processes then end."""
        variable = f"RAY_OVERRIDE_NODE_ID_FOR_TESTING={node}"
        [raylet] = [pid for pid in raylets() if variable in Path(f"/proc/{pid}/environ").read_text().split("\0")]
        os.kill(raylet, signal.SIGKILL)


def raylets() -> list[int]:
    """The raylets of this machine that may be looked at."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes().partition(b"\0")[0].endswith(b"/raylet/raylet"):
                found.append(int(path.parent.name))
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def running():
    """`ray start --head` on loopback, with a token, a dashboard, and an autoscaler for nodes of one core."""
    # The paths of Ray's sockets must be short; pytest's directories are too long.
    temp = Path("/tmp") / f"ratchet-{secrets.token_hex(3)}"
    temp.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {
        "SMALL_ENGINE": small_engine.__file__,
        "PATH": "/usr/bin:/bin",  # no activated environment: jobs must find the interpreter without it
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray then keeps 127.0.0.1 and listens only there
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        # A node whose process is gone is noticed after 3 s. A slow answer of a busy machine counts for nothing.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "20000",
        "RAY_health_check_failure_threshold": "3",
    }
    address, dashboard = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    node = {"CPU": 1, "object_store_memory": 200 << 20}
    config = temp / "autoscaler.json"
    config.write_text(json.dumps(fake_nodes.configuration(address, node, most=4)))
    head = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0"),
            *("--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}", "--labels=group=head"),
            "--dashboard-agent-listen-port=0",  # any: the default may be that of another cluster, even a dying one
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard.rpartition(':')[2]}"),
            *(f"--object-store-memory={200 << 20}", f"--temp-dir={temp}/head", f"--autoscaling-config={config}"),
        ],
        env=environment | fake_nodes.environment(str(temp)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert any("Ray runtime started" in line for line in head.stdout)
        yield RunningCluster(address, f"http://{dashboard}", environment, temp)
        head.terminate()
        head.wait(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        for process in processes_of(temp):  # the nodes are in sessions of their own
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(temp, ignore_errors=True)


def processes_of(directory: Path) -> list[int]:
    """The processes that have this directory in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"{directory}/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A user's directory: prompts, a reward function, a config, and modules with the names of our packages."""
    place = tmp_path_factory.mktemp("user")
    (place / "my_rewards.py").write_text(REWARD.format(runs=str(place / "runs")))
    (place / "runs").mkdir()  # it is not sent along
    for name in ("actors", "common", "deploy", "learner"):
        (place / f"{name}.py").write_text("raise ImportError('a module named like one of our packages')\n")
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"ask a{i}"}) + "\n" for i in range(8)))
    cfg = tiny_config(
        save_tiny_model(tmp_path_factory.mktemp("model")),
        num_steps=STEPS,
        prompts={"train": "prompts.jsonl", "heldout": None, "max_tokens": 8},
        evaluation={"prompts": 0},
        generators={"dtype": "float32", "kv_cache_mib": 16, "cpus": 1, "min": 1, "max": 2},  # each needs a node
        learner={"precision": "fp32", "cpus": 0, **ON_HEAD},
        reference={"dtype": "float32", **ON_HEAD},
        reward={
            "sources": [{"name": "a_words", "function": "my_rewards:a_words"}],
            **{"timeout_s": 900, "call_timeout_s": 800, **ON_HEAD},
        },
        ray={"autoscaler": True},
    )
    (place / "tiny.toml").write_text(cfg.to_toml())
    return place


def command(*arguments):
    return [sys.executable, "-P", "-m", "deploy.cli", *map(str, arguments)]


def ratchet(place, environment, *arguments):
    """Runs the command line in the user's directory, with the project imported from elsewhere."""
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command(*arguments), cwd=place, env=environment, capture_output=True, text=True, timeout=180)


class SubmittedRun:
    """A run of `ratchet submit`, and what its directory shows."""

    def __init__(self, running: RunningCluster, place: Path) -> None:
        self.runs, self.directory = place / "runs", place / "runs/story"
        self.allow(2)
        with open(self.runs / "told.txt", "w") as told:
            self._process = subprocess.Popen(
                command("submit", "tiny.toml", "seed=3", "--address", running.dashboard, "--run", self.directory),
                cwd=place,
                env={**running.environment, "PYTHONPATH": str(ROOT)},
                stdout=told,
                stderr=subprocess.STDOUT,
            )

    @property
    def told(self) -> str:
        return (self.runs / "told.txt").read_text()

    def allow(self, steps: int) -> None:
        """Lets the run make this many steps."""
        (self.runs / "next").write_text(str(steps))
        (self.runs / "next").rename(self.runs / "allowed")

    def step(self, number: int) -> None:
        """Lets the run make this step, and waits for it."""
        self.allow(number)
        self.wait_for(f"step {number}", lambda: self.steps == number)

    def wait_for(self, what: str, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self._process.poll() in (None, 0), f"the run ended before: {what}: {self.told}"
            assert time.monotonic() < deadline, f"waited {LIMIT_S} s for: {what}: {self.told}"
            time.sleep(0.1)

    @property
    def steps(self) -> int:
        return len(list(self.directory.glob("journal/step-*.arrow")))

    def nodes(self, event: str) -> list[str]:
        """The nodes of the generators with this event, in order."""
        events = read_records(self.directory / "pool-events.jsonl")
        return [e["node"] for e in events if (e["role"], e["event"]) == ("Generator", event)]

    def end(self) -> int:
        """Lets the run make all its steps, and returns the exit code. Later scores need not wait either."""
        self.allow(STEPS + 1)
        return self._process.wait(timeout=LIMIT_S)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Story:
    """What happened to a job."""

    run: SubmittedRun
    code: int
    jobs: str  # the cluster's list of jobs
    joined: list[str]  # the nodes of the first three generators
    num_unpacked: int  # nodes that had unpacked the uploaded packages when the third generator joined


@pytest.fixture(scope="module")
def story(running, place):
    """A job on a cluster that has only its head. The nodes of its generators come, are drained and are killed, and its
    driver is killed. It is helped once: `ratchet scale` asks for fewer generators."""
    run = SubmittedRun(running, place)
    try:
        run.wait_for("two steps and two generators", lambda: run.steps == 2 and len(run.nodes("joined")) == 2)
        jobs = json.dumps(running.ask("/api/jobs/"))

        drained = run.nodes("joined")[0]
        running.drain_node(drained)
        run.step(3)
        run.wait_for("the drained generator to leave", lambda: run.nodes("left") == [drained])
        run.wait_for("a third generator", lambda: len(run.nodes("joined")) == 3)
        joined = run.nodes("joined")
        run.step(4)
        num_unpacked = len({path.parents[4] for path in running.directory.glob(UNPACKED)})

        scaled = ratchet(place, running.environment, "scale", run.directory, "--generators", 1)
        assert scaled.returncode == 0, scaled.stderr
        run.wait_for("another one to leave", lambda: len(run.nodes("left")) == 2)
        [last] = set(joined) - set(run.nodes("left"))
        run.wait_for("the empty nodes to go", lambda: running.nodes() == {last})

        running.kill_node(last)
        run.wait_for("the death of the last generator", lambda: run.nodes("died") == [last])
        [driver] = processes_with("train", str(run.directory))
        os.kill(driver, signal.SIGKILL)
        code = run.end()
        run.wait_for("the last nodes to go", lambda: not running.nodes())
        yield Story(run, code, jobs, joined, num_unpacked)
    finally:
        run.stop()


def test_the_job_ends_although_its_driver_and_all_its_nodes_are_lost(story):
    told = story.run.told
    assert story.code == 0, told
    assert f"run directory on the cluster: {story.run.directory}" in told
    assert "ready after" in told  # the job's log
    assert told.count("restart 1 of 3: ratchet train --resume") == 1
    assert "restart 2" not in told
    assert len(json.loads((story.run.directory / "run.json").read_text())["starts"]) == 2


def test_each_generator_had_a_node_that_the_autoscaler_added_for_it(story):
    """The nodes that went are waited for in `story`."""
    assert len(set(story.joined)) == 3
    assert len(story.run.nodes("joined")) > 3
    assert not set(story.run.nodes("joined")[3:]) & set(story.joined)


def test_every_sample_of_the_job_is_in_the_journal_once(story, running, place):
    run = story.run
    found = audit.examine(run.directory, seed=3, num_prompts=8, max_staleness=0)
    assert (found.faults, found.lost, found.trained_twice) == ([], 0, 0)
    assert (found.steps, found.samples) == (STEPS, 4 * STEPS)
    audited = ratchet(place, running.environment, "audit", run.directory, "--replay")
    assert audited.returncode == 0, audited.stdout + audited.stderr


def test_the_job_runs_on_every_node_with_the_uploaded_code(story):
    assert story.num_unpacked == 1 + len(story.joined)  # the head, too
    assert "_ray_pkg_" in (story.run.runs / "imported").read_text()  # neither the user's `common` nor an installed one


def test_the_job_list_shows_the_run_but_not_its_config(story):
    assert str(story.run.directory) in story.jobs
    assert "seed" not in story.jobs
    assert "a_words" not in story.jobs
    assert "seed = 3" in (story.run.directory / "config.toml").read_text()


def test_a_job_that_continues_a_finished_run_says_so(story, running, place):
    environment = {**running.environment, "RAY_ADDRESS": "127.0.0.1:9"}  # --address overrides it
    done = ratchet(place, environment, "submit", "--resume", story.run.directory, "--address", running.dashboard)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all {STEPS} steps are done" in done.stdout.partition("submitted")[2], done.stdout


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
