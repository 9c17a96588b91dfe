"""Ways to divide machines among learner, engines and services. Runs in the driver; pure arithmetic.

A layout has the settings of one way, each with its reason. Of the layouts that fit, deploy/plan/suggest.py takes one
with about the shortest predicted step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.generation.kv_cache import USABLE, bytes_per_sequence
from common.config.ppo import Config
from common.config.sources import ModelSourceConfig
from common.memory import GIB, MIB
from common.model.size import ModelSize
from deploy.plan.micro_batches import sizes
from deploy.plan.needs import Need
from deploy.plan.placement import Node

Layout = dict[str, tuple[Any, str]]  # value and reason of each setting; None: the setting is left out
PARTS = (1, 2, 4, 8)
MOST_APART = 4  # GPUs for services alone, at most


@dataclass(frozen=True)
class Machines:
    """The nodes as layouts see them."""

    nodes: Sequence[Node]

    @property
    def gpus(self) -> int:
        """GPUs that nobody uses."""
        return sum(int(node.gpus) for node in self.nodes if node.gpu_memory)

    @property
    def gpu_memory(self) -> int:
        """Bytes of the smallest GPU."""
        return min((node.gpu_memory for node in self.nodes if node.gpus >= 1), default=0)

    def share(self, size: int) -> int:
        """The share of a GPU that has room for this many bytes, in percent."""
        return math.ceil(100 * size / self.gpu_memory) + 1


def layouts(
    cfg: Config, machines: Machines, model: ModelSize, needs: Callable[[Config], Sequence[Need]], *, every: bool = True
) -> Iterator[Layout]:
    """The layouts of a config on these machines. `needs`: the processes of the config, with all roles on GPUs. Without
    `every`, only powers of two as numbers of ranks: enough to find out whether any layout fits."""
    services = [] if cfg.learner.lora else ["reference"]
    if any(isinstance(source, ModelSourceConfig) for source in (*cfg.reward.sources, *cfg.evaluation.judges)):
        services.append("reward")
    if not machines.gpus:
        yield from _on_cpus(cfg, machines, model)
    elif machines.gpus > 1:
        yield from _apart(machines, needs(cfg), services, every=every)
    else:
        found = (_in_turns(cfg, tokens, machines, needs, services) for tokens in sizes(model, machines.nodes))
        yield from filter(None, found)


def _on_cpus(cfg: Config, machines: Machines, model: ModelSize) -> Iterator[Layout]:
    """One process for each role; they take turns on the cores. The layouts differ in the size of the KV cache, the
    largest first."""
    cores = max(1, *(int(node.cpus) for node in machines.nodes))
    half = max(1, cores // 2)
    no_gpu = "no GPU is free" if any(node.gpus for node in machines.nodes) else "there is no GPU"
    layout: Layout = {
        "max_staleness": (0, "learning takes most of a step: the roles take turns, and the learner gets all cores"),
        "learner.gpus": (0, no_gpu),
        "learner.ranks": (1, "one process uses all cores"),
        "learner.threads": (cores, "it works alone"),
        "generators.gpus": (0, no_gpu),
        "generators.tensor_parallel": (1, "one process uses its cores"),
        "generators.min": (1, "one engine uses its cores"),
        "generators.threads": (half, "generators and services work at the same time"),
        "generators.sleep": (None, "engines on CPUs never sleep"),
        "reference.gpus": (0, no_gpu),
        "reference.threads": (half, "it works next to the generators"),
        "reward.gpus": (0, no_gpu),
    }
    if sum(node.cpus for node in machines.nodes) < cfg.learner.cpus + cfg.generators.cpus:
        layout |= {f"{section}.cpus": (0, "they share the cores") for section in ("learner", "generators")}
    _, sequence = bytes_per_sequence(cfg.generators, model, max_tokens=cfg.max_sequence_tokens)
    for rollouts in dict.fromkeys((cfg.generators.max_running, 8, 1)):
        cache = max(256, -(-rollouts * sequence // MIB))
        room = f"room for {cache * MIB // sequence} rollouts at their longest"
        yield layout | {"generators.kv_cache_mib": (cache, room)}


def _apart(machines: Machines, needs: Sequence[Need], services: Sequence[str], *, every: bool) -> Iterator[Layout]:
    """Ranks and engines on different GPUs, so that they work at the same time. Services have separate GPUs, or a share
    of each engine's GPU, or of one engine's GPU. On separate GPUs they share one if it has room for all of them."""
    shares = {name: machines.share(_device(needs, name)) for name in services}
    of_each = 1 if sum(shares.values()) <= 100 else len(shares)  # GPUs for one process of each service
    state = sum(_part(needs, "learner", name) for name in ("weights", "gradients", "optimizer state"))
    for ranks in range(1, machines.gpus):
        if state / ranks > machines.gpu_memory or not (every or ranks & (ranks - 1) == 0):
            continue
        for own in range(0, MOST_APART + 1 if services else 1, of_each):
            for parts in _parts(machines, needs):
                if (engines := (machines.gpus - ranks - own) // parts) < 1:
                    continue
                for replicas in {own // of_each} if own else {engines, 1} if services else {1}:
                    layout = _divided(machines, needs, shares, ranks, engines, parts, own, replicas)
                    if layout is not None:
                        yield layout


def _parts(machines: Machines, needs: Sequence[Need]) -> Sequence[int]:
    """The fewest GPUs that hold the weights of an engine, and twice as many."""
    weights = _part(needs, "generators", "weights")
    fewest = next((parts for parts in PARTS if weights / parts < USABLE * machines.gpu_memory), PARTS[-1])
    return [parts for parts in PARTS if fewest <= parts <= 2 * fewest]


def _divided(
    machines: Machines,
    needs: Sequence[Need],
    shares: Mapping[str, int],
    ranks: int,
    engines: int,
    parts: int,
    own: int,
    replicas: int,
) -> Layout | None:
    """The layout with these numbers. None if the shares of a GPU do not allow it. `own`: GPUs for services alone.
    `replicas`: of each service. `shares`: of a GPU for one process of each service, in percent."""
    together = sum(shares.values())
    if own:  # nobody else uses the rest of these GPUs
        shares = {
            name: share + (100 - together) // len(shares) if together <= 100 else 100 for name, share in shares.items()
        }
    whole = own > 0 or not shares
    engine = 100 if whole else 100 - together
    # Two engines with half a GPU each would be on the same one.
    if engine < (5 if engines == 1 else 51) or (parts > 1 and not whole):
        return None
    layout: Layout = {
        "max_staleness": (1, "engines and ranks have their own GPUs, so the next batch is written meanwhile"),
        "learner.gpus": (1, "each rank has a GPU"),
        "learner.ranks": (ranks, f"of {machines.gpus} GPUs: with these engines, about the shortest predicted step"),
        "generators.gpus": (
            parts if parts > 1 else engine / 100,
            "a whole engine" if whole else "what the services leave of a GPU",
        ),
        "generators.tensor_parallel": (
            parts,
            "one GPU holds the weights" if parts == 1 else f"the weights need {parts} GPUs",
        ),
        "generators.min": (engines, f"{engines * parts} GPU(s) generate"),
        "generators.kv_cache_mib": (None, "the rest of the engine's share"),
        "generators.sleep": (None, "engines have GPUs of their own and stay awake"),
    }
    where = "on a GPU without an engine" if own else "next to an engine"
    for name, share in shares.items():
        layout[f"{name}.gpus"] = (share / 100, f"{_gib(_device(needs, name))} GiB, {where}")
        layout[f"{name}.min"] = (replicas, "one process serves all" if replicas == 1 else f"each {where}")
    return layout


def _in_turns(
    cfg: Config,
    tokens: int,
    machines: Machines,
    needs: Callable[[Config], Sequence[Need]],
    services: Sequence[str],
) -> Layout | None:
    """All processes on one GPU. Each gets the share that it needs between updates. The engine gets the rest, and lends
    it to each update. None if nothing is left for the engine."""
    learner = cfg.learner.model_copy(update={"micro_batch_tokens": tokens})
    found = needs(cfg.model_copy(update={"learner": learner}))
    first = next(need for need in found if need.section == "learner")
    kept = sum(first.device.values()) - sum(first.in_turn.values())
    shares = {name: machines.share(_device(found, name)) for name in services}
    shares["learner"] = machines.share(int(kept / USABLE))
    rest = 100 - sum(shares.values())
    if rest < 5:
        return None
    layout: Layout = {
        "max_staleness": (0, "the engine waits for each update, and lends it its memory"),
        "learner.ranks": (1, "there is one GPU for all"),
        "learner.gpus": (shares["learner"] / 100, f"it keeps {_gib(kept)} GiB between updates"),
        "learner.micro_batch_tokens": (tokens, "the largest with which an update fits"),
        "generators.gpus": (rest / 100, "the rest of the GPU"),
        "generators.tensor_parallel": (1, "there is one GPU"),
        "generators.min": (1, "there is one GPU"),
        "generators.kv_cache_mib": (None, "the rest of the engine's share"),
        "generators.sleep": (None, "the engine sleeps during updates where it shares the learner's GPU"),
    }
    for name in services:
        layout[f"{name}.gpus"] = (shares[name] / 100, f"{_gib(_device(found, name))} GiB")
    return layout


def _part(needs: Sequence[Need], section: str, name: str) -> int:
    return max((need.device.get(name, 0) for need in needs if need.section == section), default=0)


def _device(needs: Sequence[Need], section: str) -> int:
    return max((sum(need.device.values()) for need in needs if need.section == section), default=0)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
