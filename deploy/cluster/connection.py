"""The Ray cluster of a command: the one that the user names, or one that it starts on this machine and stops later.

Runs in the driver.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import grpc
import ray
from ray._private import ray_constants, utils, worker
from ray._private import state as ray_state
from ray._private.state import available_resources_per_node
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.pool.ray_meters import RayMeters
from common.config.base import RayConfig
from common.errors import RoleError, UserError
from common.metrics import meters
from deploy.cluster import own_cluster
from deploy.cluster.addresses import ask_control_service, ask_node_manager, named_address, reachable
from deploy.cluster.earlier_drivers import GONE_S, RUN_OF_JOB, run_of_job, wait_for_earlier_drivers
from deploy.cluster.job import shown_of_job
from deploy.ending import exit_message, signals
from deploy.ending.driver_watcher import watched
from deploy.ending.limits import end_run, limited
from deploy.ending.native_errors import native_errors_to
from deploy.ending.ray_errors import dead_cluster_process, errors_shown_first, essential_processes
from deploy.plan.machines import gpu_memory_query
from deploy.plan.placement import Node

GPU_ANSWER_S = 20.0  # longest wait for the memory of the GPUs of all nodes
SHUTDOWN_S = 15.0  # Ray usually takes 2 s, but waits without a limit for processes that are suspended


@contextmanager
def cluster(cfg: RayConfig, run: Path | None = None) -> Iterator[list[Node]]:
    """Connects, and yields the free resources of each node. An error in the body is shown before Ray is shut down: see
    `errors_shown_first`. On a cluster that others use too, it first waits until processes that earlier drivers of the
    run directory `run` have left are gone."""
    address = named_address(cfg)
    joined = None if address is None else reachable(address)
    leaving = ExitStack()
    try:
        with errors_shown_first():
            directory = leaving.enter_context(own_cluster.private_directory())
            watcher = leaving.enter_context(watched(directory, *exit_message.how_to_continue()))

            def before_hard_exit() -> None:
                watcher.dismiss()
                own_cluster.remove(directory, wait_s=0)

            signals.call_before_hard_exit(before_hard_exit)
            leaving.callback(signals.call_before_hard_exit, None)
            leaving.enter_context(native_errors_to(directory / "driver.err"))
            leaving.enter_context(_quiet_ray())
            leaving.callback(_shut_down)
            with limited("the start of the Ray cluster (ray.startup_timeout_s)", cfg.startup_timeout_s):
                if joined is None:
                    own_cluster.start(cfg, directory, _job(run))
                else:
                    _join(joined, _job(run))
            signals.reinstall_handlers()
            with limited("the search for processes and nodes of the Ray cluster", GONE_S + cfg.max_silence_s):
                leaving.enter_context(_watched(cfg.max_silence_s))
                leaving.enter_context(_metered())
                if joined is not None and run is not None:
                    wait_for_earlier_drivers(run)
                nodes = _free_nodes()
            yield nodes
    finally:
        with signals.uninterrupted():
            leaving.close()
    signals.raise_if_stopped()


@contextmanager
def _metered() -> Iterator[None]:
    """Exports the driver's meters through Ray."""
    exported = RayMeters()
    meters.install(exported, role="Driver", replica="Driver")
    try:
        yield
    finally:
        exported.close()
        meters.install(meters.InMemory())


def _job(run: Path | None) -> JobConfig:
    """The job as Ray's dashboard lists it. Ray has no way to change it later, so it cannot name the step."""
    return JobConfig() if run is None else JobConfig(metadata={RUN_OF_JOB: run_of_job(run), **shown_of_job(run)})


def _join(address: str, job: JobConfig) -> None:
    try:
        ray.init(address=address, job_config=job, logging_level="ERROR", log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"this machine cannot join the Ray cluster at {address}: {error}; start ratchet on one of the "
            "cluster's nodes, or send the run there with ratchet submit"
        ) from error


@contextmanager
def _quiet_ray() -> Iterator[None]:
    """During the block, Ray does not take over SIGTERM, does not print long texts when one of its processes dies, and
    does not print the output of the roles, which goes to `role_output_to`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sets_handler, prints = utils.set_sigterm_handler, worker.print_to_stdstream
    if signals.handlers_installed():
        utils.set_sigterm_handler = lambda handler: None
    worker.print_to_stdstream = lambda *args, **kwargs: None
    try:
        yield
    finally:
        utils.set_sigterm_handler, worker.print_to_stdstream = sets_handler, prints


@contextmanager
def _watched(max_silence_s: float) -> Iterator[None]:
    """Ends the run with a message when its cluster is lost. Without this, Ray's C++ code ends this process without a
    message, at once or after a minute, when the node manager or the control service dies."""
    ended = threading.Event()

    def lost(error: RoleError | None) -> None:
        if error is not None and not ended.is_set():
            end_run(error)

    def wait_for(pid: int) -> None:
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if not ended.is_set():
            lost(dead_cluster_process())

    def ask_repeatedly(what: str, ask: Callable[[float], None]) -> None:
        interval, silent = max_silence_s / 8, 0.0
        while silent <= max_silence_s:
            began = time.monotonic()
            if ended.wait(interval):
                return
            try:
                ask(interval)
                silent = 0.0
            except grpc.RpcError:
                # At most two intervals: time in which this process itself was suspended (Ctrl-Z) does not count.
                silent += min(time.monotonic() - began, 2 * interval)
        lost(RoleError(f"{what} has not answered for {max_silence_s:g} s (ray.max_silence_s)"))

    gcs, raylet = ray.get_runtime_context().gcs_address, _own_node_manager()
    silences = {
        f"the Ray cluster at {gcs}": partial(ask_control_service, gcs),
        f"Ray's node manager (raylet) of this machine, {raylet},": partial(ask_node_manager, raylet),
    }
    for pid in essential_processes():
        threading.Thread(target=wait_for, args=(pid,), name="cluster", daemon=True).start()
    for silence in silences.items():
        threading.Thread(target=ask_repeatedly, args=silence, name="cluster", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _own_node_manager() -> str:
    """HOST:PORT of the node manager that this process is connected to."""
    me = ray.get_runtime_context().get_node_id()
    [node] = [node for node in ray.nodes() if node["NodeID"] == me]
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def _shut_down() -> None:
    """Shuts Ray down, for SHUTDOWN_S at most."""
    thread = threading.Thread(target=ray.shutdown, name="shutdown", daemon=True)
    thread.start()
    thread.join(SHUTDOWN_S)


def metrics_addresses() -> Path:
    """The file, for Prometheus, in which Ray keeps the metrics addresses of all nodes while it has a dashboard. It is
    on the cluster's first node."""
    session = worker._global_node.get_session_dir_path()
    return Path(session) / ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE


def dashboard() -> str | None:
    """The dashboard's HOST:PORT, if there is one."""
    return worker._global_node.webui_url or None


def _free_nodes() -> list[Node]:
    leaving = ray_state.state.get_draining_nodes()  # Ray starts no process on these
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving}
    free = {  # without the resources of other jobs
        node_id: left for node_id, left in available_resources_per_node().items() if node_id in alive
    }
    gpu_memory = _gpu_memory([node_id for node_id, left in free.items() if left.get("GPU")])
    return [
        Node(
            alive[node]["NodeManagerAddress"],
            left.get("CPU", 0),
            left.get("GPU", 0),
            int(left.get("memory", 0)),
            gpu_memory.get(node, 0),
            alive[node]["Resources"].get("GPU", 0) - left.get("GPU", 0),
            int(alive[node]["Resources"].get("object_store_memory", 0)),
            alive[node]["Labels"],
        )
        for node, left in free.items()
    ]


def _gpu_memory(node_ids: Sequence[str]) -> dict[str, int]:
    """The memory of the largest usable GPU of each node, bytes. Nodes without nvidia-smi, or that do not answer in
    time, are left out."""

    asked = {
        node_id: ray.remote(gpu_memory_query())
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
        .remote()
        for node_id in node_ids
    }
    found = {}
    deadline = time.monotonic() + GPU_ANSWER_S
    for node_id, answer in asked.items():
        with suppress(ray.exceptions.RayError):
            found[node_id] = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
    return found
