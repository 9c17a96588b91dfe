"""Several processes as one learner: each takes a share of a batch and holds a share of every weight."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

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
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
            )
        return cls(rank, world)

    def shares(self, costs: Sequence[int]) -> list[list[int]]:
        """Of every rank the indices that are its own: every index is some rank's, and the ranks' costs are as even as
        giving the dearest first to the least loaded makes them."""
        loads, shares = [0] * self.world, [[] for _ in range(self.world)]  # type: tuple[list[int], list[list[int]]]
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            least = loads.index(min(loads))
            loads[least] += costs[index]
            shares[least].append(index)
        return [sorted(share) for share in shares]

    def micro_batches(self, costs: Sequence[int], group: Callable[[list[int]], list[list[int]]]) -> list[list[int]]:
        """This rank's share of the indices, in micro-batches; `group` makes groups of places in a share.

        Every rank gets the same number of them, since all gather and reduce together: the last ones may be empty.
        """
        plans = [[[share[i] for i in places] for places in group(share)] for share in self.shares(costs)]
        mine = plans[self.rank]
        return mine + [[] for _ in range(max(map(len, plans)) - len(mine))]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place, of a tensor on the CPU."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

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


def shard(network: nn.Module, exact: Iterable[nn.Module], *, precision: str, device: torch.device) -> None:
    """Spreads parameters, and with them gradients and optimizer state, over all ranks (FSDP2, after ZeRO-3,
    arXiv:1910.02054).

    Layer by layer, so that a device holds its share and one whole layer. Forward and backward passes gather a layer in
    `precision`; gradients are averaged over ranks in float32. The `exact` modules are gathered in float32.
    """
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float32
    )
    for module in exact:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for module in network.modules():
        if isinstance(module, GradientCheckpointingLayer):  # what transformers calls one layer of a model
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def whole(parameter: Tensor) -> Tensor:
    """A parameter in full, without its gradient. Every rank must ask for it at the same time."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients down to a joint norm of `max_norm` if it is larger; returns what it was, over all ranks.

    Raises RuntimeError if it is not finite: the run stops here, while weights and checkpoint are still sound.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not math.isfinite(norm):
        raise RuntimeError(
            f"the gradient's norm is not finite ({norm.item()}): nothing was updated; lower the learning rate"
        )
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()
