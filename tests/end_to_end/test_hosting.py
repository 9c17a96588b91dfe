"""Roles on real Ray keep to the cores they are given, and what they print reaches the log of the run."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest
import ray

from actors.pool.ray_actor import actor
from common.config.base import RayConfig, Replicated
from common.config.ppo import LearnerConfig
from common.errors import RoleError, UserError
from deploy.cluster import connection
from deploy.cluster.connection import cluster
from deploy.cluster.role_output import role_output_to
from deploy.ending.ray_errors import errors_shown_first
from deploy.run.log import RunLog
from learner.ranks.group import LearnerGroup
from tests.ray_pools import start_pool

pytestmark = pytest.mark.ray


class Worker:
    def __init__(self, name: str = "Worker") -> None:
        self._pinned_before_it_began = os.sched_getaffinity(0)

    def ready(self) -> str:
        return "ready"

    def join(self, rank: int, world: int, rendezvous: str) -> int:
        return 0

    def affinities(self) -> list[set[int]]:
        threads = [os.sched_getaffinity(int(thread.name)) for thread in Path("/proc/self/task").iterdir()]
        return [self._pinned_before_it_began, *threads]


class Chatty(Worker):
    def speak(self) -> None:
        print("one word\nand another", flush=True)

    def die(self) -> None:
        os.abort()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The file of `nvidia-smi`: all processes of the cluster find it first. Initially it tells of three GPUs."""
    program = tmp_path_factory.mktemp("bin") / "nvidia-smi"
    answer = r"24576, 8.6\n81559, 9.0\n98304, 7.5\n"
    program.write_text(f'#!/bin/sh\n[ "$1" = --query-gpu=memory.total,compute_cap ] && printf "{answer}"\n')
    program.chmod(0o755)
    return program


@pytest.fixture(scope="module")
def started(program):
    """One cluster for all tests, because starting it takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        with cluster(RayConfig(object_store_mib=128, dashboard=False)):
            yield


def test_the_log_has_what_a_role_printed_and_the_traceback_of_its_death(started, tmp_path):
    async def scenario():
        pool = await start_pool(Chatty, Replicated(), startup_timeout_s=60)
        try:
            await pool.each(lambda replica: replica.handle.speak.remote())
            await pool.ready[0].handle.die.remote()
        finally:
            pool.stop()

    log = RunLog()
    log.open(tmp_path)
    with pytest.raises(RoleError, match="died"), errors_shown_first(), role_output_to(log.write):
        asyncio.run(asyncio.wait_for(scenario(), 60))
    log.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    [name] = {line[24:].partition(": ")[0] for line in lines if "word" in line or "Aborted" in line}
    assert re.fullmatch(r"Chatty\(0\) \(pid \d+\)", name)
    assert [line.partition(": ")[2] for line in lines if "word" in line] == ["one word"]
    assert any("Fatal Python error: Aborted" in line for line in lines)
    assert any(line.endswith(" in die") for line in lines)


def test_every_thread_of_a_role_keeps_to_its_cores(started):
    core = max(os.sched_getaffinity(0))

    async def scenario():
        pool = await start_pool(Worker, Replicated(cores=(core,)), startup_timeout_s=60)
        affinities = await pool.each(lambda replica: replica.handle.affinities.remote())
        pool.stop()
        return affinities["Worker(0)"]

    affinities = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert len(affinities) > 5  # Ray's own threads, too
    assert all(allowed == {core} for allowed in affinities)


def test_each_node_is_asked_for_the_memory_of_its_largest_usable_gpu(started, program):
    [node] = ray.nodes()
    assert connection._gpu_memory([node["NodeID"]]) == {node["NodeID"]: 81559 << 20}
    program.write_text("#!/bin/sh\nexit 1\n")
    assert connection._gpu_memory([node["NodeID"]]) == {}


@pytest.mark.parametrize("role", ["pool", "learner"])
def test_a_core_that_no_machine_has_is_a_user_error(started, role):
    async def start():
        if role == "pool":
            await start_pool(Worker, Replicated(cores=(4096,)), startup_timeout_s=60)
        else:
            cfg = LearnerConfig(cores=(4096,), cpus=0)
            await LearnerGroup(lambda rank: actor(Worker, cfg, "Worker(0)").remote(), cfg, startup_timeout_s=60).start()

    with (
        pytest.raises(UserError, match=r"^Worker\(0\): cores \[4096\] are not among .* leave it out$"),
        errors_shown_first(),
    ):
        asyncio.run(asyncio.wait_for(start(), 60))
