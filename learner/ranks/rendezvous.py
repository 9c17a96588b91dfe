"""The meeting place of a group's ranks, before they exchange numbers. Runs in every trainer rank.

Rank 0 opens the rendezvous and tells the others its address. On a cluster of this machine alone it is a file, so that
nothing listens on a port. Between machines it is a store that rank 0 serves, on its node's own address and a free port.
"""

from __future__ import annotations

import os
import socket
import tempfile
from datetime import timedelta
from urllib.parse import urlsplit

import psutil
from torch import distributed as dist


def open_rendezvous(host: str) -> tuple[str, dist.Store | None]:
    """The address to join, and the store that this process serves there. `host` is the address of this node. The port
    is bound from the moment it is chosen, so no other program can take it before the ranks have met."""
    if _is_this_machine(host):
        return f"file://{tempfile.mkdtemp(prefix='ratchet-')}/rendezvous", None
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    return f"tcp://{host}:{port}", store


def _is_this_machine(host: str) -> bool:
    """True if the cluster's nodes know each other by loopback addresses."""
    return host.startswith("127.")


def join_rendezvous(
    address: str, served: dist.Store | None, *, backend: str, rank: int, world: int, timeout_s: float
) -> None:
    """Initialises torch.distributed. Returns when all ranks have joined. `served` is the store of rank 0."""
    timeout = timedelta(seconds=timeout_s)
    if address.startswith("file://"):
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world, timeout=timeout)
        return
    url = urlsplit(address)
    assert url.hostname is not None
    assert url.port is not None
    if (interface := interface_towards(url.hostname)) is not None:
        # Gloo would take the interface of the host's name, which on many systems is the loopback one.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    store = served or dist.TCPStore(url.hostname, url.port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def interface_towards(host: str) -> str | None:
    """The network interface through which this machine reaches the host; None if it has none with that address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # chooses a route and sends nothing
        own = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs()
    return next((name for name, found in interfaces.items() if any(one.address == own for one in found)), None)
