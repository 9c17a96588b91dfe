"""Waits for the end of processes that earlier drivers of a run have left on a cluster. Runs in the driver.

If a driver is killed, a cluster that it started ends with it. On a shared cluster, Ray ends the processes of the
driver, but needs time to notice that it is dead. Until then they hold memory that a new driver needs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import state as ray_state
from ray._raylet import GcsClient

from common.errors import RoleError

RUN_OF_JOB = "ratchet_run"  # in the metadata of a driver's Ray job
GONE_S = 90.0  # Ray needs about a minute to notice that the whole machine of a driver is gone
LOOK_EVERY_S = 0.2


def run_of_job(run: Path) -> str:
    """The text in the metadata of a driver's job that names its run."""
    return str(run.resolve())


def wait_for_earlier_drivers(run: Path) -> None:
    """Returns when no process of an earlier driver of this run is alive. Raises RoleError after GONE_S. The caller owns
    the run directory, so no such driver is alive itself."""
    deadline = time.monotonic() + GONE_S
    while left := list(_left_behind(run_of_job(run))):
        if time.monotonic() > deadline:
            raise RoleError(
                f"processes of an earlier driver of this run are still alive after {GONE_S:g} s: {', '.join(left)}; "
                "end them, and continue with --resume"
            )
        time.sleep(LOOK_EVERY_S)


def _left_behind(run: str) -> Iterator[str]:
    """Names of the actors of the run's earlier jobs that are alive, or whose processes on this machine are."""
    context = ray.get_runtime_context()
    jobs = GcsClient(address=context.gcs_address).get_all_job_info(
        skip_submission_job_info_field=True, skip_is_running_tasks_field=True, timeout=GONE_S
    )
    here = ray.util.get_node_ip_address()
    for job, info in jobs.items():
        if info.config.metadata.get(RUN_OF_JOB) != run or job.hex() == context.get_job_id():
            continue
        for actor in ray_state.actors(job_id=job).values():
            ended_s = actor["EndTime"] / 1000 if actor["State"] == "DEAD" else None
            if ended_s is None or (actor["Address"]["IPAddress"] == here and _ran_at(actor["Pid"], ended_s)):
                yield _name(actor)


def _name(actor: dict[str, Any]) -> str:
    return f"{actor['Name'] or actor['ActorClassName']} (process {actor['Pid']}, {actor['Address']['IPAddress']})"


def _ran_at(pid: int, time_s: float) -> bool:
    """True if the process is alive and was alive at this time, in seconds since 1970. A process that started later only
    has the same number."""
    with suppress(OSError, IndexError, ValueError, StopIteration):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        lines = Path("/proc/stat").read_text().splitlines()
        booted_s = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
        return pid > 0 and state != "Z" and booted_s + int(fields[18]) / os.sysconf("SC_CLK_TCK") < time_s
    return False
