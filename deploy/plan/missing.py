"""The hardware that a run lacks, in words. Runs in the driver; pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from common.memory import GIB
from deploy.plan.placement import Node

MORE_NODES = (1, 2, 4, 8)
# For each resource of a node: words for an amount, the size of its unit, and more units than any run takes.
RESOURCES: Mapping[str, tuple[str, int, int]] = {
    "gpus": ("{} GPUs in each node", 1, 64),
    "gpu_memory": ("GPUs of {} GiB", GIB, 1 << 20),
    "cpus": ("{} CPUs in each node", 1, 1 << 20),
    "memory": ("{} GiB of free memory in each node", GIB, 1 << 20),
    "store": ("an object store of {} GiB in each node", GIB, 1 << 20),
}
LABELS = "the labels of its roles on these nodes (ray start --labels)"
Fits = Callable[[Sequence[Node]], bool]


def missing_hardware(nodes: Sequence[Node], fits: Fits) -> str:
    """Says with which hardware a run would fit: more nodes of this kind, or more in each node; and whether nodes lack
    the labels that roles ask for. The text continues "the run"."""
    nodes = list(nodes) or [Node("", 0, 0, 0)]
    if ways := _ways(nodes, fits):
        return f"would fit with {', or with '.join(ways)}"
    unlabelled = [replace(node, labels=None) for node in nodes]
    if fits(unlabelled):
        return f"would fit with {LABELS}"
    if ways := _ways(unlabelled, fits):
        return f"would fit with {LABELS}, and with {', or with '.join(ways)}"
    return "would not fit with more of this hardware either"


def _ways(nodes: Sequence[Node], fits: Fits) -> list[str]:
    """The hardware that is missing, in words: more nodes, or more in each node."""
    ways = []
    if (count := _more_nodes(nodes, fits)) is not None:
        ways.append(f"{count} more node(s) like {'the largest' if len(nodes) > 1 else 'this one'}")
    if short := _short(nodes, fits):
        enough = fits([replace(_at_least(node, short), gpus_in_use=0.0) for node in nodes])
        listed = " and ".join(RESOURCES[name][0].format(amount) for name, amount in short.items())
        ways.append(f"{'' if enough else 'more than '}{listed}")
    return ways


def _more_nodes(nodes: Sequence[Node], fits: Fits) -> int | None:
    """The smallest of MORE_NODES for which the run fits, with this many nodes like the largest one added. None if none
    is enough."""
    largest = max(nodes, key=lambda node: (node.gpus, node.gpu_memory, node.memory))
    return next((n for n in MORE_NODES if fits([*nodes, *[largest] * n])), None)


def _short(nodes: Sequence[Node], fits: Fits) -> dict[str, int]:
    """The resources that are short even with plenty of all others, and the fewest units that are enough. More GPUs
    count only if there are too few."""
    short: dict[str, int] = {}
    for name in RESOURCES:
        kept = {name} if "gpus" in short else {name, "gpus"}
        new_gpus = name == "gpu_memory" and "gpus" in short and not any(node.gpu_memory for node in nodes)
        if not new_gpus and fits([_plenty(node, kept) for node in nodes]):
            continue
        if (amount := _least(name, kept, nodes, fits)) is not None:
            short[name] = amount
    return short


def _least(name: str, kept: Collection[str], nodes: Sequence[Node], fits: Fits) -> int | None:
    """The fewest units of one resource in each node, with plenty of those not `kept`. None if no amount is enough."""
    _, unit, most = RESOURCES[name]

    def enough(units: int) -> bool:
        return fits([_with(_plenty(node, kept), {name: units * unit}) for node in nodes])

    if not enough(most):
        return None
    least = 1  # 0 bytes mean that the size is not known
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle + 1, most)
    return least


def _plenty(node: Node, kept: Collection[str]) -> Node:
    """The node with plenty of all resources that are not `kept`, and with GPUs that nobody uses if these are not."""
    plenty = {name: unit * most for name, (_, unit, most) in RESOURCES.items() if name not in kept}
    return _with(node, plenty if "gpus" in kept else {**plenty, "gpus_in_use": 0})


def _at_least(node: Node, amounts: Mapping[str, int]) -> Node:
    return _with(node, {name: max(getattr(node, name), n * RESOURCES[name][1]) for name, n in amounts.items()})


def _with(node: Node, values: Mapping[str, Any]) -> Node:
    return replace(node, **values)
