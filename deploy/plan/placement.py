"""Who runs where: the node and the GPUs that each process gets. Runs in the driver; pure arithmetic.

The estimates come from deploy/plan/needs.py. In a run, Ray then decides on which node each process runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actors.generation.kv_cache import USABLE
from deploy.plan.needs import Need

ROUNDING = 1e-4  # Ray counts in ten-thousandths, so a sum of fractions may exceed the node by a rounding error

# What a node may have too little of, in the order of `_Room.lacks`.
RESOURCES = ("CPUs", "GPUs", "memory", "memory of a GPU", "object store", "labels")


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
    labels: Mapping[str, str] | None = None  # of its Ray node; None if they are not known


@dataclass(frozen=True)
class Place:
    """The place of one process."""

    need: Need
    node: int  # its index in `Placement.nodes`
    gpus: tuple[int, ...] = ()  # the GPUs of the node that it uses; empty if others use some of them


@dataclass(frozen=True)
class NoRoom:
    """A process that no node has room for."""

    need: Need
    lacking: Sequence[Sequence[bool]]  # for each node, whether it has too little of each of RESOURCES


@dataclass(frozen=True)
class Placement:
    """The places of processes that run at the same time, and the processes without one."""

    nodes: Sequence[Node]
    places: Sequence[Place]
    no_room: Sequence[NoRoom]
    lender_missing: bool = False  # no engine is on the GPU of a learner that counts on an engine's share
    waiting: Sequence[Need] = ()  # no room now; each waits for a node of the autoscaler
    autoscaler: bool = False  # it adds nodes for processes that have no room

    @property
    def fits(self) -> bool:
        """True if every process has a place, or waits for a node."""
        return not self.no_room and not self.lender_missing

    @property
    def needs(self) -> list[Need]:
        """All processes, with and without a place."""
        return [*(place.need for place in self.places), *(missing.need for missing in self.no_room), *self.waiting]


def place(wanted: Sequence[Need], nodes: Sequence[Node], *, autoscaler: bool = False) -> Placement:
    """Places the processes: largest first, each goes to the first node that has room. With an `autoscaler`, processes
    for which it adds nodes come last, and wait if they find no room."""
    rooms = [_Room.of(node) for node in nodes]
    places, no_room, waiting = [], [], []

    def waits(need: Need) -> bool:
        return autoscaler and gets_a_node(need)

    for need in sorted(wanted, key=lambda n: (waits(n), -n.gpus, -n.memory, -n.cpus)):
        lacking = [room.lacks(need) for room in rooms]
        chosen = next((index for index, lacks in enumerate(lacking) if not any(lacks)), None)
        if chosen is not None:
            places.append(Place(need, chosen, rooms[chosen].take(need)))
        elif waits(need):
            waiting.append(need)
        else:
            no_room.append(NoRoom(need, lacking))
    return Placement(nodes, places, no_room, any(room.lenders_missing() for room in rooms), waiting, autoscaler)


def gets_a_node(need: Need) -> bool:
    """True if an autoscaler adds a node for this process, and the run waits for it. A pool waits for room, ranks do
    not. Ray starts a process that reserves neither CPUs nor GPUs at once, whatever memory is free."""
    return need.section != "learner" and (need.cpus > 0 or need.gpus > 0)


@dataclass
class _Room:
    """The resources of a node that are still free."""

    cpus: float
    gpus: list[float] | float  # of each GPU; of all together if others use some, because Ray does not say which
    memory: float
    gpu_memory: int
    store: int
    labels: Mapping[str, str] | None
    on_gpus: list[list[Need]] = field(default_factory=list)  # processes on each GPU; empty if others use some

    @classmethod
    def of(cls, node: Node) -> _Room:
        gpus: list[float] | float = node.gpus if node.gpus_in_use > ROUNDING else [1.0] * round(node.gpus)
        on_gpus: list[list[Need]] = [[] for _ in gpus] if isinstance(gpus, list) else []
        return cls(node.cpus, gpus, float(node.memory), node.gpu_memory, node.store, node.labels, on_gpus)

    def gpus_for(self, need: Need) -> list[int] | None:
        """The GPUs that the process would take: the fullest one with room for a fraction, or empty ones for a whole
        number. None if there are too few: Ray never adds up fractions of several GPUs for one process."""
        if not isinstance(self.gpus, list):
            return [] if self.gpus >= need.gpus - ROUNDING else None
        share, count = (need.gpus, 1) if 0 < need.gpus < 1 else (1.0, round(need.gpus))
        fitting = sorted((free, index) for index, free in enumerate(self.gpus) if free >= share - ROUNDING)
        return [index for _, index in fitting[:count]] if len(fitting) >= count else None

    def lacks(self, need: Need) -> tuple[bool, ...]:
        """For each of RESOURCES whether this node has too little of it. The processes of a node share what is in its
        store, so it need not hold the sum."""
        return (
            self.cpus < need.cpus - ROUNDING,
            self.gpus_for(need) is None,
            self.memory < need.memory,
            self.gpu_memory > 0 and not _fits_gpu(need, self.gpu_memory),
            0 < self.store < sum(need.store.values()),
            self.labels is not None and not need.labels.items() <= self.labels.items(),
        )

    def take(self, need: Need) -> tuple[int, ...]:
        """Gives the process its resources. Returns its GPUs."""
        chosen: tuple[int, ...] = ()
        if isinstance(self.gpus, list):
            chosen = tuple(self.gpus_for(need) or ())
            for index in chosen:
                self.gpus[index] -= min(need.gpus, 1.0)
                self.on_gpus[index].append(need)
        else:
            self.gpus -= need.gpus
        self.cpus -= need.cpus
        self.memory -= need.memory
        return chosen

    def lenders_missing(self) -> bool:
        """True if a process needs a share that an engine lends, but other processes have that share of its GPU."""
        for processes in self.on_gpus:
            others = sum(need.gpus for need in processes if need.section != "generators")
            if any(others + need.lent > 1 + ROUNDING for need in processes):
                return True
        return False


def gpu_share(need: Need) -> float:
    """The part of each of its GPUs that a process may fill."""
    return min(need.gpus + need.lent, largest_share(need))


def largest_share(need: Need) -> float:
    """The most of a GPU that a process of this role ever fills. An engine leaves a part free, also if it has no
    neighbours."""
    return USABLE if need.section == "generators" else 1.0


def _fits_gpu(need: Need, gpu_memory: int) -> bool:
    """True if a process fits its share of a GPU, while the engine sleeps and while it does not."""
    most = sum(need.device.values())
    lasting = most - sum(need.in_turn.values())
    return most <= gpu_memory * gpu_share(need) and lasting <= gpu_memory * min(need.gpus, 1.0)
