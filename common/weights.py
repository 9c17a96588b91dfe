"""A versioned set of weights as flat, checksummed bf16 buckets: pack on the learner, verify and unpack on a generator.

Buckets are NumPy arrays, since those cross Ray's object store without a copy and arrive read-only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import xxhash
from torch import Tensor


class CorruptWeightsError(RuntimeError):
    """A bucket does not have the checksum its manifest states."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `shape` bf16 values from `offset` (in values) of bucket number `bucket`."""

    name: str
    shape: tuple[int, ...]
    bucket: int
    offset: int


@dataclass(frozen=True)
class WeightSet:
    """All weights of one policy version, under their Hugging Face names."""

    version: int
    entries: tuple[Entry, ...]
    buckets: tuple[np.ndarray, ...]  # int16 [n]: the bits of bf16 values
    checksums: tuple[int, ...]  # xxh3_64 of each bucket's bytes

    def verify(self) -> None:
        """Raises CorruptWeightsError if any bucket is not what the publisher packed."""
        for i, (bucket, expected) in enumerate(zip(self.buckets, self.checksums, strict=True)):
            if (found := _checksum(bucket)) != expected:
                raise CorruptWeightsError(
                    f"weights version {self.version}: bucket {i} has checksum {found:016x}, its manifest says "
                    f"{expected:016x}; the set is refused and must be published again"
                )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, bf16 tensor) pairs: views of the buckets, for reading only."""
        for entry in self.entries:
            flat = self.buckets[entry.bucket][entry.offset : entry.offset + prod(entry.shape)]
            yield entry.name, torch.from_dlpack(flat).view(torch.bfloat16).view(entry.shape)


def pack(named_tensors: Iterable[tuple[str, Tensor]], version: int, *, bucket_bytes: int = 64 << 20) -> WeightSet:
    """Casts to bf16 and lays the tensors one after another into buckets of at most `bucket_bytes` (or one tensor)."""
    entries: list[Entry] = []
    groups: list[list[Tensor]] = []
    filled = 0
    for name, tensor in named_tensors:
        size = 2 * tensor.numel()
        if not groups or filled + size > bucket_bytes:
            groups.append([])
            filled = 0
        entries.append(Entry(name, tuple(tensor.shape), len(groups) - 1, filled // 2))
        groups[-1].append(tensor)
        filled += size
    buckets = tuple(_flatten(group) for group in groups)
    return WeightSet(version, tuple(entries), buckets, tuple(_checksum(bucket) for bucket in buckets))


@torch.no_grad()
def _flatten(tensors: list[Tensor]) -> np.ndarray:
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=torch.bfloat16)
    for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True):
        part.copy_(tensor.reshape(-1))  # cast and device-to-host in one pass
    return flat.view(torch.int16).numpy()


def _checksum(bucket: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(bucket.data.cast("B"))
