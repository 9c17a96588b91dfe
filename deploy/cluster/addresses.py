"""The address of the Ray cluster that a run joins, and a check that it answers. Runs in the driver, before anything
starts."""

from __future__ import annotations

import os

import grpc
import ray
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel

from common.config.base import RayConfig
from common.errors import UserError

ANSWER_S = 10  # a cluster usually answers in milliseconds; Ray itself would wait for a minute
_NAME_ONE = "name a running one with --address, ray.address or the variable RAY_ADDRESS, or start one on this machine"


def named_address(cfg: RayConfig) -> str | None:
    """The address of the running cluster to join, from the config (which --address overrides) or Ray's own variable.
    None: the command starts its own cluster."""
    address = cfg.address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def refused(where: str) -> UserError:
    return UserError(
        f"the Ray cluster at {where} asks for authentication, and the token here is missing or wrong; set "
        "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
    )


def reachable(address: str) -> str:
    """The address as HOST:PORT, once its cluster has answered and accepted this process' token. Raises UserError.
    ray.init alone takes long to fail, and its error does not distinguish a wrong token from a wrong address."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "auto":
        return _only_one()
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UserError(
            f"the Ray cluster's address ({address}) must read HOST:PORT, such as 127.0.0.1:6379, auto or local"
        )
    if (fault := _fault(address)) is not None:
        raise fault
    if _fault(_as_ray_reads_it(address)) is not None:
        raise UserError(
            f"the Ray cluster at {address} listens on loopback only: another run or ray.init has started it for "
            f"itself, and no other process can join it; {_NAME_ONE} with --address local"
        )
    return address


def ask_control_service(address: str, timeout_s: float = ANSWER_S) -> None:
    """Asks the cluster's control service for any answer. Raises grpc.RpcError, or Ray's error for a wrong token."""
    with init_grpc_channel(address) as channel:
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=timeout_s)


def ask_node_manager(address: str, timeout_s: float = ANSWER_S) -> None:
    """Asks the node manager for its health. Any answer will do. Raises grpc.RpcError if none comes."""
    with init_grpc_channel(address) as channel:
        try:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise


def _fault(address: str) -> UserError | None:
    try:
        ask_control_service(address)
    except ray.exceptions.AuthenticationError:
        return refused(address)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return refused(address)
        return UserError(f"no Ray cluster answers at {address} ({error.details()}); {_NAME_ONE} with --address local")
    return None


def _as_ray_reads_it(address: str) -> str:
    """The address that Ray uses instead. Ray replaces a loopback address by the machine's network address, where a
    cluster that one command started for itself does not listen."""
    return services.canonicalize_bootstrap_address(address) or address


def _only_one() -> str:
    """The only cluster on this machine that others may join, such as `ray start` starts."""
    services.find_gcs_addresses.cache_clear()
    joinable = [found for found in sorted(services.find_gcs_addresses()) if _fault(_as_ray_reads_it(found)) is None]
    if not joinable:
        raise UserError(
            "--address auto: no Ray cluster that others may join runs on this machine; start one with ray start --head "
            "or name one with --address HOST:PORT"
        )
    if len(joinable) > 1:
        raise UserError(
            f"--address auto: {len(joinable)} Ray clusters run on this machine ({', '.join(joinable)}); name one of "
            "them with --address HOST:PORT"
        )
    return joinable[0]
