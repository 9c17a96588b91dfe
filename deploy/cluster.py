"""The Ray cluster of a run: the one that is named, or one started on this machine and stopped at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants
from ray._private.state import available_resources_per_node

from actors.hosting import RayMeters
from common import meters
from common.config import RayConfig, UserError
from deploy.placement import MIB, Node


@contextmanager
def cluster(cfg: RayConfig) -> Iterator[list[Node]]:
    """Connects, and yields what each node has free."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if cfg.address is not None:
        try:
            ray.init(address=cfg.address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ray.exceptions.RayError) as error:
            raise UserError(f"no Ray cluster answers at ray.address ({cfg.address}): {error}") from error
    else:
        os.environ.setdefault("RAY_worker_niceness", "0")  # the default of 15 starves roles beside anything else
        # ray.init turns a loopback address into the machine's own, and its servers then listen on every interface;
        # with this switch, read at import and in every process it starts, they stay on loopback.
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False
        ray.init(
            address="local",
            include_dashboard=cfg.dashboard,
            object_store_memory=cfg.object_store_mib * MIB,
            log_to_driver=False,
            logging_level="ERROR",
        )
    exported = RayMeters()
    meters.install(exported, role="Driver", replica="Driver")
    try:
        yield _free_nodes()
    finally:
        exported.close()
        meters.install(meters.InMemory())
        ray.shutdown()


def _free_nodes() -> list[Node]:
    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return [
        Node(alive[node_id], free.get("CPU", 0), free.get("GPU", 0), int(free.get("memory", 0)))
        for node_id, free in available_resources_per_node().items()  # what other jobs hold is not in it
        if node_id in alive
    ]
