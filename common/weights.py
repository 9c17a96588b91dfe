"""A policy's weights on their way to the generators: flat, checksummed bf16 buckets, packed and verified one by one,
whole or as what has changed since the version before.

The values are NumPy arrays, since those cross Ray's object store without a copy and arrive read-only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from common.errors import CorruptWeightsError


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its bucket: `shape` bf16 values from `offset` (in values)."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Some of the weights of one policy version, under their Hugging Face names."""

    version: int
    index: int  # 0, 1, 2, ... within the version
    last: bool  # no more of this version follow
    entries: tuple[Entry, ...]
    values: np.ndarray  # int16 [n]: the bits of bf16 values
    checksum: int  # xxh3_64 of everything above

    def verify(self) -> None:
        """Raises CorruptWeightsError if this is not what the publisher packed."""
        found = _checksum((self.version, self.index, self.last, self.entries), self.values)
        _compare(f"weights version {self.version}: bucket {self.index}", found, self.checksum)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, bf16 tensor) pairs: views of the values, for reading only."""
        values = torch.from_dlpack(self.values).view(torch.bfloat16)
        for entry in self.entries:
            yield entry.name, values[entry.offset : entry.offset + prod(entry.shape)].view(entry.shape)


@dataclass(frozen=True)
class Changes:
    """The values of a Bucket that differ from an older version's: to one who holds that, the whole bucket."""

    version: int
    index: int
    last: bool
    base_version: int
    positions: np.ndarray  # uint32 [k], rising
    values: np.ndarray  # int16 [k]: what stands there now, the bits of bf16 values
    result: int  # checksum of the whole new Bucket
    checksum: int  # xxh3_64 of everything above

    @property
    def nbytes(self) -> int:
        return self.positions.nbytes + self.values.nbytes

    def apply(self, held: Bucket) -> Bucket:
        """The new bucket, bit for bit. Raises CorruptWeightsError unless base and result are what the publisher had."""
        what = f"weights version {self.version}: changes of bucket {self.index} since version {self.base_version}"
        _compare(what, _checksum(self._facts(), self.positions, self.values), self.checksum)
        if (held.version, held.index) != (self.base_version, self.index):
            raise CorruptWeightsError(f"{what} came where bucket {held.index} of version {held.version} is held")
        values = held.values.copy()
        # A bucket of another layout has other positions: then the checksum below is wrong, wherever these are clipped.
        np.put(values, self.positions, self.values, mode="clip")
        bucket = Bucket(self.version, self.index, self.last, held.entries, values, self.result)
        bucket.verify()
        return bucket

    def _facts(self) -> tuple:
        return self.version, self.index, self.last, self.base_version, self.result


def changes(old: Bucket, new: Bucket) -> Changes | None:
    """From `old` to `new`; None where the layout differs, or the whole bucket is no larger."""
    if (old.index, old.entries) != (new.index, new.entries):
        return None
    different = old.values != new.values  # as bits: NaN equals itself, and -0.0 is not 0.0
    if (4 + 2) * np.count_nonzero(different) >= new.values.nbytes:
        return None
    positions = np.flatnonzero(different).astype(np.uint32)
    made = Changes(new.version, new.index, new.last, old.version, positions, new.values[positions], new.checksum, 0)
    return replace(made, checksum=_checksum(made._facts(), made.positions, made.values))


@dataclass(frozen=True)
class PublishedBucket:
    """A published bucket, as it is passed on without being looked into: object references, and what they weigh."""

    full: Any  # of a Bucket
    changes: Any | None  # of its Changes since the version published before, if there are any
    full_bytes: int
    changes_bytes: int | None


Note = tuple[int, int, int | None]  # a bucket's index, its bytes, those of its changes


def publication(packed: Iterable[Bucket], held: Sequence[Bucket] = ()) -> Iterator[Bucket | Changes | Note | None]:
    """Each bucket, its changes since the one of `held` if they are any use, and a note: who waits for the note may pass
    both on unseen."""
    for bucket in packed:
        yield bucket
        changed = changes(held[bucket.index], bucket) if bucket.index < len(held) else None
        yield changed
        yield bucket.index, bucket.values.nbytes, None if changed is None else changed.nbytes


def buckets(
    named_tensors: Iterable[tuple[str, Tensor]], version: int, *, bucket_bytes: int = 32 << 20
) -> Iterator[Bucket]:
    """Casts to bf16 and lays the tensors one after another into buckets of at most `bucket_bytes` (or one tensor).

    Lazy: a tensor is asked for once all before it are packed, so gathered shards need not exist all at once. Only the
    one that turns out not to fit is held while the bucket before it is handed over.
    """
    index, filled = 0, 0
    entries: list[Entry] = []
    flat = torch.empty(0, dtype=torch.bfloat16)
    for name, tensor in named_tensors:
        size = tensor.numel()
        if entries and 2 * (filled + size) > bucket_bytes:
            yield _bucket(version, index, False, entries, flat[:filled])
            index, filled, entries = index + 1, 0, []
        if not entries:
            flat = torch.empty(max(bucket_bytes // 2, size), dtype=torch.bfloat16)
        flat[filled : filled + size].copy_(tensor.detach().reshape(-1))  # cast and device-to-host in one pass
        entries.append(Entry(name, tuple(tensor.shape), filled))
        filled += size
    if entries:
        yield _bucket(version, index, True, entries, flat[:filled])


class IncomingWeights:
    """What a receiver has of a new set: every bucket must come whole, once, in order and of one version.

    Bucket 0 begins anew, whatever was left of a set that broke off.
    """

    def __init__(self) -> None:
        self._begin(-1)

    def _begin(self, version: int) -> None:
        self._version = version
        self._next = 0
        self._whole = False
        self._names: set[str] = set()

    def add(self, bucket: Bucket) -> None:
        """Raises CorruptWeightsError; then the set is void until it begins anew."""
        try:
            bucket.verify()
            if bucket.index == 0:
                self._begin(bucket.version)
            if bucket.version != self._version or bucket.index != self._next or self._whole:
                raise CorruptWeightsError(
                    f"weights version {bucket.version}: bucket {bucket.index} came where "
                    f"{'nothing more' if self._whole else f'bucket {self._next} of version {self._version}'} was due"
                )
            names = {entry.name for entry in bucket.entries}
            if twice := names & self._names:
                raise CorruptWeightsError(f"weights version {bucket.version}: {min(twice)} came twice")
        except CorruptWeightsError:
            self._begin(-1)
            raise
        self._names |= names
        self._next += 1
        self._whole = bucket.last

    def check_whole(self, version: int) -> None:
        """Raises CorruptWeightsError unless every bucket of `version` is there."""
        if version != self._version or not self._whole:
            raise CorruptWeightsError(
                f"weights version {version} is not whole: {self._next} buckets of version {self._version} came"
                f"{'' if self._whole else ', the last one not among them'}"
            )


def _bucket(version: int, index: int, last: bool, entries: list[Entry], flat: Tensor) -> Bucket:
    values, named = flat.view(torch.int16).numpy(), tuple(entries)
    return Bucket(version, index, last, named, values, _checksum((version, index, last, named), values))


def _checksum(facts: tuple, *arrays: np.ndarray) -> int:
    # What is said about the values counts as much as they do: a right tensor under a wrong name is corruption too.
    digest = xxhash.xxh3_64(repr(facts).encode())
    for array in arrays:
        digest.update(array.data.cast("B"))
    return digest.intdigest()


def _compare(what: str, found: int, packed: int) -> None:
    if found != packed:
        raise CorruptWeightsError(
            f"{what} has checksum {found:016x}, but was packed with {packed:016x}; the set is refused and must be "
            "published again"
        )
