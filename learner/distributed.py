"""Several processes as one learner: each takes a share of a batch, and their gradients are summed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from common.metrics import Metrics


class Ranks:
    """This process among `world` that do the same. Alone, every method is free of communication."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    @classmethod
    def join(cls, rank: int, world: int, rendezvous: str, *, device: torch.device, timeout_s: float) -> Ranks:
        """Returns when all have joined. No later exchange waits longer than `timeout_s` for a rank that is gone.

        `rendezvous` is a torch.distributed init method; a `file://` one says that all ranks are on this machine, and
        they then talk over loopback only.
        """
        if world > 1:
            if rendezvous.startswith("file://"):
                os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
            )
        return cls(rank, world)

    def share(self, costs: Sequence[int]) -> list[int]:
        """The indices that are this rank's: every index is some rank's, and the ranks' costs are as even as giving the
        dearest first to the least loaded makes them."""
        loads, mine = [0] * self.world, []
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            least = loads.index(min(loads))
            loads[least] += costs[index]
            if least == self.rank:
                mine.append(index)
        return sorted(mine)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every rank's gradients become the sum over ranks; one that had nothing to do counts as zero."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def merge(self, metrics: Metrics) -> None:
        """Means become those over all ranks; the other values are the same on each already."""
        if self.world == 1:
            return
        parts: list[dict[str, tuple[float, float]]] = [{} for _ in range(self.world)]
        dist.all_gather_object(parts, metrics.sums())
        for rank, sums in enumerate(parts):
            if rank != self.rank:
                for key, (total, count) in sums.items():
                    metrics.mean(key, total, count)
