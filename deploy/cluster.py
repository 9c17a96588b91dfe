"""The Ray cluster of a run: the one that is named, or one started on this machine and stopped at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import ray
from ray._private import ray_constants
from ray._private import worker as _worker
from ray._private.grpc_utils import init_grpc_channel
from ray._private.state import available_resources_per_node

from actors.ray_meters import RayMeters
from common import meters
from common.config import RayConfig, UserError
from deploy.placement import MIB, Node

ANSWER_S = 10  # a cluster that answers does so in milliseconds; Ray itself would wait a minute


@contextmanager
def cluster(cfg: RayConfig) -> Iterator[list[Node]]:
    """Connects, and yields what each node has free."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without it Ray's C++ code takes SIGTERM over as it connects, prints a stack and aborts.
    os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"
    if (address := named_address(cfg)) is not None:
        _check_answers(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise UserError(
                f"this machine cannot join the Ray cluster at {address}: {error}; start ratchet on one of the "
                "cluster's nodes, or send the run there with ratchet submit"
            ) from error
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
    except Exception as error:
        if (fault := users_fault(error)) is not None:
            raise fault from error
        raise
    finally:
        exported.close()
        meters.install(meters.InMemory())
        ray.shutdown()


def metrics_addresses() -> Path:
    """The file in which Ray keeps the metrics addresses of all nodes while it has a dashboard, as Prometheus reads
    them. It is on the cluster's first node."""
    session = _worker._global_node.get_session_dir_path()
    return Path(session) / ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE


def dashboard() -> str | None:
    """The dashboard's HOST:PORT, if there is one."""
    return _worker._global_node.webui_url or None


def users_fault(error: BaseException | None) -> UserError | None:
    """The UserError that a role raised as its process began, and that `error` follows from. Ray passes on its text."""
    while error is not None:
        if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
            _, found, message = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")
            return UserError(message.strip()) if found else None
        error = error.__cause__
    return None


def named_address(cfg: RayConfig) -> str | None:
    """The running cluster that is named, by the config (where --address has gone) or by Ray's own variable."""
    address = cfg.address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def refused(where: str) -> UserError:
    return UserError(
        f"the Ray cluster at {where} asks for authentication, and the token here is missing or wrong; set "
        "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
    )


def _check_answers(address: str) -> None:
    """Raises UserError unless a cluster is there and lets this process in: ray.init takes long to fail, and does not
    tell a wrong token from a wrong address."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise UserError(
            f"the Ray cluster's address ({address}) must read HOST:PORT, such as 127.0.0.1:6379, auto or local"
        )
    try:
        with init_grpc_channel(address) as channel:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=ANSWER_S)
    except ray.exceptions.AuthenticationError as error:
        raise refused(address) from error
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise refused(address) from error
        raise UserError(
            f"no Ray cluster answers at {address} ({error.details()}); name a running one with --address, ray.address "
            "or the variable RAY_ADDRESS, or start one on this machine with --address local"
        ) from error


def _free_nodes() -> list[Node]:
    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return [
        Node(alive[node_id], free.get("CPU", 0), free.get("GPU", 0), int(free.get("memory", 0)))
        for node_id, free in available_resources_per_node().items()  # what other jobs hold is not in it
        if node_id in alive
    ]
