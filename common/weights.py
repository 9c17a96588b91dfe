"""A policy's weights on their way from the learner to the generators. Runs anywhere.

The learner packs its weights into buckets: flat arrays of bf16 values with a checksum. A generator verifies each bucket
as it arrives. Where generators keep the previous set, a bucket may travel as a delta: only the values that changed.

The values are NumPy arrays, because Ray's object store passes those on without a copy. They arrive read-only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
import xxhash
from torch import Tensor

from common.errors import CorruptWeightsError
from common.model.transfer import cast_on_gpu
from common.types import Manifest


@dataclass(frozen=True)
class Entry:
    """The place of one tensor in its bucket: `shape` bf16 values from `offset` (counted in values)."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Some of the weights of one policy version, under their Hugging Face names."""

    version: int
    index: int  # 0, 1, 2, ... within the version
    last: bool  # this is the last bucket of its version
    entries: tuple[Entry, ...]
    values: np.ndarray  # int16 [n]: the bits of bf16 values
    checksum: int  # xxh3_64 of all fields above

    def verify(self) -> None:
        """Raises CorruptWeightsError if this is not what the publisher packed."""
        found = _checksum((self.version, self.index, self.last, self.entries), self.values)
        _compare(f"weights version {self.version}: bucket {self.index}", found, self.checksum)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, bf16 tensor) pairs. The tensors are views of the values and must not be written to."""
        values = torch.from_dlpack(self.values).view(torch.bfloat16)
        for entry in self.entries:
            yield entry.name, values[entry.offset : entry.offset + prod(entry.shape)].view(entry.shape)


@dataclass(frozen=True)
class Delta:
    """The values of a Bucket that differ from those of an older version. A holder of the old one rebuilds the new."""

    version: int
    index: int
    last: bool
    base_version: int
    positions: np.ndarray  # uint32 [k], increasing
    values: np.ndarray  # int16 [k]: the new bits at these positions
    bucket_checksum: int  # checksum of the whole new Bucket
    checksum: int  # xxh3_64 of all fields above

    @property
    def nbytes(self) -> int:
        return self.positions.nbytes + self.values.nbytes

    def apply(self, base: Bucket) -> Bucket:
        """The new bucket, bit for bit. Raises CorruptWeightsError unless `base` and the result are the publisher's."""
        what = f"weights version {self.version}: delta of bucket {self.index} since version {self.base_version}"
        _compare(what, _checksum(self._header(), self.positions, self.values), self.checksum)
        if (base.version, base.index) != (self.base_version, self.index):
            raise CorruptWeightsError(f"{what} was applied to bucket {base.index} of version {base.version}")
        values = base.values.copy()
        # If `base` has another layout, it may be too short for some positions. They are clipped; the checksum fails.
        np.put(values, self.positions, self.values, mode="clip")
        bucket = Bucket(self.version, self.index, self.last, base.entries, values, self.bucket_checksum)
        bucket.verify()
        return bucket

    def _header(self) -> tuple:
        return self.version, self.index, self.last, self.base_version, self.bucket_checksum


def make_delta(old: Bucket, new: Bucket) -> Delta | None:
    """The delta from `old` to `new`; None where their layouts differ, or where it would not be smaller than `new`."""
    if (old.index, old.entries) != (new.index, new.entries):
        return None
    different = old.values != new.values  # compared as bits: NaN equals itself, and -0.0 is not 0.0
    if (4 + 2) * np.count_nonzero(different) >= new.values.nbytes:
        return None
    positions = np.flatnonzero(different).astype(np.uint32)
    delta = Delta(new.version, new.index, new.last, old.version, positions, new.values[positions], new.checksum, 0)
    return replace(delta, checksum=_checksum(delta._header(), delta.positions, delta.values))


def publication(packed: Iterable[Bucket], base: Sequence[Bucket] = ()) -> Iterator[Bucket | Delta | Manifest]:
    """The items that a rank publishes: every bucket, then the manifest. `base`: the previous version's buckets, if they
    are kept. Each bucket is then followed by its best form: its delta, or the bucket again if no delta is smaller."""
    full_bytes, best_bytes = [], []
    for bucket in packed:
        yield bucket
        delta = make_delta(base[bucket.index], bucket) if bucket.index < len(base) else None
        if base:
            yield bucket if delta is None else delta
        full_bytes.append(bucket.values.nbytes)
        best_bytes.append(bucket.values.nbytes if delta is None else delta.nbytes)
    yield Manifest(tuple(full_bytes), tuple(best_bytes))


def buckets(
    named_tensors: Iterable[tuple[str, Tensor]], version: int, *, bucket_bytes: int = 32 << 20
) -> Iterator[Bucket]:
    """Casts tensors to bf16 and packs them, in order, into buckets of at most `bucket_bytes` (or of one tensor).

    Lazy: each tensor is requested after the ones before it are packed, so a sharded model is never gathered as a whole.
    While the caller handles a bucket, only the next tensor, which did not fit into it, is held.
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
            flat = torch.empty(max(bucket_bytes // 2, size), dtype=torch.bfloat16, pin_memory=tensor.is_cuda)
        flat[filled : filled + size].copy_(cast_on_gpu(tensor.detach()).reshape(-1))
        entries.append(Entry(name, tuple(tensor.shape), filled))
        filled += size
    if entries:
        yield _bucket(version, index, True, entries, flat[:filled])


class IncomingWeights:
    """Checks a new set as it arrives: every bucket must arrive undamaged, once, in order and with the same version.

    Bucket 0 starts a new set, even if the set before it is incomplete.
    """

    def __init__(self) -> None:
        self._start(-1)

    def _start(self, version: int) -> None:
        self._version = version
        self._next = 0
        self._complete = False
        self._names: set[str] = set()

    def add(self, bucket: Bucket) -> None:
        """Checks the next bucket. Raises CorruptWeightsError; every later bucket is then refused until bucket 0."""
        try:
            bucket.verify()
            if bucket.index == 0:
                self._start(bucket.version)
            if bucket.version != self._version or bucket.index != self._next or self._complete:
                expected = "no more" if self._complete else f"bucket {self._next} of version {self._version}"
                raise CorruptWeightsError(
                    f"weights version {bucket.version}: bucket {bucket.index} came, but {expected} was expected"
                )
            names = {entry.name for entry in bucket.entries}
            if twice := names & self._names:
                raise CorruptWeightsError(f"weights version {bucket.version}: {min(twice)} came twice")
        except CorruptWeightsError:
            self._start(-1)
            raise
        self._names |= names
        self._next += 1
        self._complete = bucket.last

    def check_complete(self, version: int) -> None:
        """Raises CorruptWeightsError unless every bucket of `version` has arrived."""
        if version != self._version or not self._complete:
            raise CorruptWeightsError(
                f"weights version {version} is not complete: {self._next} buckets of version {self._version} came"
                f"{'' if self._complete else ', without the last one'}"
            )


def _bucket(version: int, index: int, last: bool, entries: list[Entry], flat: Tensor) -> Bucket:
    values, layout = flat.view(torch.int16).numpy(), tuple(entries)
    return Bucket(version, index, last, layout, values, _checksum((version, index, last, layout), values))


def _checksum(header: tuple, *arrays: np.ndarray) -> int:
    # The header is included: a right tensor under a wrong name is corruption too.
    digest = xxhash.xxh3_64(repr(header).encode())
    for array in arrays:
        digest.update(array.data.cast("B"))
    return digest.intdigest()


def _compare(what: str, found: int, packed: int) -> None:
    if found != packed:
        raise CorruptWeightsError(
            f"{what} has checksum {found:016x}, but was packed with {packed:016x}; the set is refused and must be "
            "published again"
        )
