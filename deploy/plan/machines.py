"""The nodes of a plan: described ones, this machine, or those of a running cluster. Runs in the driver."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common.config.base import RayConfig
from common.errors import UserError
from common.memory import GIB, MIB
from deploy.plan.placement import Node

# Bytes of a described node that no role gets: the operating system, Ray's own processes (0.7 GiB on the cluster's first
# node, measured), and the driver (0.8 GiB).
SYSTEM = 2 * GIB
THIS_MACHINE = "this machine"  # the name of its node


@dataclass(frozen=True)
class Described:
    """Equal machines, as the options of `ratchet plan` describe them. None: the option is not given."""

    nodes: int | None = None
    gpus: int | None = None  # of each node
    gpu_memory: float | None = None  # of each GPU, GiB
    cpus: float | None = None  # of each node
    memory: float | None = None  # of each node, GiB

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def check(self) -> None:
        """Raises UserError unless the options describe a machine."""
        for name, value in vars(self).items():
            if value is not None and not math.isfinite(value):
                raise UserError(f"--{name.replace('_', '-')} ({value:g}) must be a finite number; give one")
        if self.cpus is None or self.memory is None:
            raise UserError(
                "a described machine needs --cpus and --memory, such as --nodes 2 --gpus 8 --gpu-memory 80 --cpus 64 "
                "--memory 512; add them, or leave all of these out to plan for this machine"
            )
        if (self.gpus is None or self.gpus == 0) != (self.gpu_memory is None):
            raise UserError(
                "--gpus (of each node) and --gpu-memory (GiB of each GPU) go together; give both, or neither"
            )

    def make(self, store_mib: int) -> list[Node]:
        """The nodes, each with an object store of this size. Raises UserError if nothing is left for processes."""
        self.check()
        assert self.cpus is not None
        assert self.memory is not None
        left = int(self.memory * GIB) - SYSTEM - store_mib * MIB
        if left <= 0:
            raise UserError(
                f"--memory ({self.memory:g} GiB) must be more than {SYSTEM / GIB:g} GiB for the system, Ray and the "
                f"driver and the object store ({store_mib / 1024:.1f} GiB); give more"
            )
        node = Node("", self.cpus, self.gpus or 0, left, int((self.gpu_memory or 0) * GIB), store=store_mib * MIB)
        return [Node(**{**vars(node), "name": f"node {index + 1}"}) for index in range(self.nodes or 1)]


@contextmanager
def machines(described: Described, ray: RayConfig, store_mib: int) -> Iterator[list[Node]]:
    """The nodes of a plan. If the options describe nodes: these. Else, if `ray.address` names a cluster: its nodes with
    their resources that are free now. Else this machine, with an object store of `store_mib`."""
    if described:
        yield described.make(store_mib)
        return
    if not joins(described, ray):
        yield [this_machine(store_mib)]
        return
    from deploy.cluster.connection import cluster

    with cluster(ray) as nodes:
        yield nodes


def joins(described: Described, ray: RayConfig) -> bool:
    """True if the nodes are those of a running cluster, whose object stores have their sizes already."""
    from deploy.cluster.addresses import named_address  # imports Ray

    return not described and named_address(ray) is not None


def this_machine(store_mib: int) -> Node:
    """This machine as Ray would see it if a run started now, with its free memory."""
    from ray._private.accelerators import get_accelerator_manager_for_resource
    from ray._private.utils import estimate_available_memory, get_num_cpus

    gpus = get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators()
    return Node(
        THIS_MACHINE,
        get_num_cpus(),
        _visible(gpus),
        estimate_available_memory() - store_mib * MIB,
        _gpu_memory() if gpus else 0,
        store=store_mib * MIB,
        labels={},
    )


def check_own_store(store_mib: int) -> None:
    """Raises UserError if a run on this machine could not start an object store of this size now. Prints a warning if
    the store would be a file on a disk, which is slow."""
    from deploy.cluster.own_cluster import check_store_here  # imports Ray

    check_store_here(store_mib)


def _visible(gpus: int) -> int:
    """The GPUs among these that CUDA_VISIBLE_DEVICES leaves visible."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if named is None else min(gpus, len([device for device in named.split(",") if device.strip()]))


def _gpu_memory() -> int:
    """The memory of the largest usable GPU of this machine, bytes; 0 if it is not known, such as without nvidia-smi."""
    try:
        return gpu_memory_query()()
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def gpu_memory_query() -> Callable[[], int]:
    """Returns a function that asks for the memory of the largest usable GPU of the machine where it runs, bytes. It
    raises an error if there is no usable GPU, or if nvidia-smi is missing, fails or does not answer. The function is
    nested, so that Ray sends its code: a node of a cluster may not have this module."""

    def largest() -> int:
        import subprocess

        command = ["nvidia-smi", "--query-gpu=memory.total,compute_cap", "--format=csv,noheader,nounits"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        cards = [line.split(",") for line in answer.splitlines()]
        return max(int(memory) for memory, capability in cards if float(capability) >= 8) << 20  # others are refused

    return largest
