"""Gradients of many parts of a batch, kept so that their inner products are known. Runs in every rank of the account.

M parts and K estimators are M x K gradients, each as large as the policy: with 16 and 8 a policy of 135M weights would
need 69 GB. So each is kept as a vector of fewer numbers, like a count sketch (Charikar et al. 2002): every weight has a
random sign and a fixed place in the vector, and the signed gradients with the same place are added up. Inner products
of such vectors are unbiased. Their standard deviation is typically about sqrt(2 / width) of the product of both norms:
0.1 % for two million numbers, far less than the noise of the gradients themselves. This is not a bound: places are not
random, so the deviation is larger if the large weights share few places. If there is room for a place for each weight,
nothing is added up and the inner products are exact.

A sketch is linear: the gradients of micro-batches are added as they come. With several ranks, each keeps a sketch of
its own share of every weight, and the inner products are summed over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

ROOM = 1 << 30  # bytes for all sketches of a rank
_CHUNK = 1 << 16  # numbers of each sketch that are multiplied at once


class GradientSketches:
    """One vector for each of `count` gradients."""

    def __init__(self, parameters: Sequence[Tensor], count: int, *, seed: int, room: int = ROOM) -> None:
        self._parameters = parameters
        sizes = [_local(parameter).numel() for parameter in parameters]
        device = _local(parameters[0]).device
        self.weights = sum(sizes)  # of this rank
        # Odd: row lengths of weight matrices are usually even, so none divides it, and the weights of one column get
        # different places.
        self.width = min(self.weights, room // (4 * count) | 1)
        self._sketches = torch.zeros(count, max(1, self.width), device=device)
        self._signs = [] if self.is_exact else [_random_signs(size, seed + at, device) for at, size in enumerate(sizes)]

    @property
    def is_exact(self) -> bool:
        return self.width >= self.weights

    @torch.no_grad()
    def add(self, number: int) -> None:
        """Adds the gradients that the parameters hold now to the sketch of this number."""
        sketch, place = self._sketches[number], 0
        for index, parameter in enumerate(self._parameters):
            size = _local(parameter).numel()
            if parameter.grad is not None and size:
                values = _local(parameter.grad).flatten().float()
                _fold(sketch, values if self.is_exact else values * self._signs[index], place)
            place = (place + size) % max(1, self.width)

    def products(self) -> Tensor:
        """Inner products of all sketches, float64 [count, count], of this rank's weights."""
        found = torch.zeros(len(self._sketches), len(self._sketches), dtype=torch.float64)
        for part in self._sketches.split(_CHUNK, dim=1):
            found += (part @ part.T).double().cpu()
        return found


def _fold(sketch: Tensor, values: Tensor, place: int) -> None:
    """Adds the values to the places from `place` on; after the last place comes the first."""
    done = 0
    while done < len(values):
        taken = min(len(sketch) - place, len(values) - done)
        sketch[place : place + taken] += values[done : done + taken]
        done, place = done + taken, 0


def _random_signs(size: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(2, (size,), generator=generator, dtype=torch.int8) * 2 - 1).to(device)


def _local(tensor: Tensor) -> Tensor:
    """This rank's share."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
