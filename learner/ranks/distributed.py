"""Several processes as one trainer: how they exchange numbers, and how each holds a share of every weight.

Runs in every trainer rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from common.errors import BatchError
from common.metrics.step import StepMetrics
from learner.ranks.rendezvous import join_rendezvous


class Ranks:
    """This process as one of `world` ranks. With a single rank no method communicates."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    @classmethod
    def join(
        cls,
        rank: int,
        world: int,
        rendezvous: str,
        *,
        served: dist.Store | None = None,
        device: torch.device,
        timeout_s: float,
    ) -> Ranks:
        """Returns when all ranks have joined. Later exchanges wait at most `timeout_s` for a rank.

        `rendezvous` and `served`: the results of `open_rendezvous` on rank 0. The other ranks get only the address.
        """
        if world > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            join_rendezvous(rendezvous, served, backend=backend, rank=rank, world=world, timeout_s=timeout_s)
        return cls(rank, world)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor on the CPU over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def merge(self, metrics: StepMetrics) -> None:
        """Makes every mean the mean over all ranks. Other values are the same on each rank already."""
        if self.world == 1:
            return
        parts: list[dict[str, tuple[float, float]]] = [{} for _ in range(self.world)]
        dist.all_gather_object(parts, metrics.sums())
        for rank, sums in enumerate(parts):
            if rank != self.rank:
                for key, (total, count) in sums.items():
                    metrics.add(key, total, count)


def shard(network: nn.Module, exact: Iterable[nn.Module], *, precision: str, device: torch.device) -> None:
    """Spreads parameters, gradients and optimizer state over all ranks (FSDP2, after ZeRO-3, arXiv:1910.02054).

    Each layer is sharded on its own, so that a device holds its share and only one layer in full. Forward and backward
    passes gather a layer in `precision`, and the `exact` modules in float32. Gradients are averaged over ranks in
    float32.
    """
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float32
    )
    for module in exact:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for module in network.modules():
        if isinstance(module, GradientCheckpointingLayer):  # transformers' class for one layer of a model
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def whole(parameter: Tensor, gather_dtype: torch.dtype | None = None) -> Tensor:
    """A parameter in full, detached. Every rank must call this at the same time. Shards are cast to `gather_dtype`
    before they are gathered; a parameter that is not sharded stays unchanged."""
    value = parameter.detach()
    if not isinstance(value, DTensor):
        return value
    return cast(DTensor, value.to(gather_dtype or value.dtype)).full_tensor()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients down to a joint norm of `max_norm` if it is larger. Returns the norm before, over all ranks.

    Raises BatchError, on every rank, if it is not finite: an optimizer step would then break the weights.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    found = norm.item()
    if not math.isfinite(found):
        raise BatchError(f"the gradient's norm is not finite ({found})")
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return found
