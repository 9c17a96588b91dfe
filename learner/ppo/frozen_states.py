"""Keeps the states of a frozen trunk, so that a value head can train on them without computing them again.

Runs in every trainer rank. Each rank has the states of the rows that it computed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.model.batches import packed_batches
from common.model.packing import Sequences
from common.model.transfer import on_device
from learner.ranks.distributed import Ranks


@dataclass(frozen=True)
class States:
    """States of response tokens as an input of a network, which returns the values of its head. FSDP would cast a plain
    tensor to the trunk's precision."""

    values: Tensor  # [n, H]


class FrozenStates:
    """States of response tokens by row, in the machine's memory. On a GPU, the states of many long responses might not
    fit next to the weights."""

    def __init__(self) -> None:
        self._states: dict[int, Tensor] = {}
        self._like = torch.empty(0)  # has the width and the dtype of a state

    def __contains__(self, row: int) -> bool:
        return row in self._states

    def add(self, rows: Sequence[int], lengths: Sequence[int], states: Tensor) -> None:
        """Keeps the states [n, H] of these rows, one row after another."""
        self._like = states[:0].cpu()
        self._states |= zip(rows, states.cpu().split(list(lengths)), strict=True)

    def of(self, rows: Sequence[int]) -> Tensor:
        """The states [n, H] of these rows, one row after another."""
        return torch.cat([self._like, *(self._states[row] for row in rows)])


class FrozenStatesOnDisk(FrozenStates):
    """The same in an unnamed file of a directory. However the process ends, the operating system then removes the file.
    Its file cache keeps as much of the file as there is free memory. A token takes its hidden size times 2 or 4
    bytes."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - open as long as this object lives
        self._places: dict[int, tuple[int, int]] = {}  # of each row: first token in the file, number of tokens
        self._tokens = 0

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def add(self, rows: Sequence[int], lengths: Sequence[int], states: Tensor) -> None:
        self._like = states[:0].cpu()
        self._file.write(_bytes(states.cpu()))
        self._file.flush()  # `of` reads past the buffer of this object
        for row, length in zip(rows, lengths, strict=True):
            self._places[row] = self._tokens, length
            self._tokens += length

    def of(self, rows: Sequence[int]) -> Tensor:
        places = [self._places[row] for row in rows]
        states = self._like.new_empty(sum(length for _, length in places), *self._like.shape[1:])
        target, size, done = _bytes(states), self._like.element_size() * self._like.shape[-1], 0
        for first, length in places:
            part = target[done : done + size * length]
            if os.preadv(self._file.fileno(), [part], size * first) != len(part):
                raise OSError(f"the file with the states of the trunk is shorter than the {self._tokens} tokens in it")
            done += len(part)
        return states


def kept_micro_batches(
    states: FrozenStates, rows: Sequence[int], lengths: Sequence[int], *, max_tokens: int, ranks: Ranks
) -> list[list[int]]:
    """The micro-batches of the rows whose states this rank has, as indices into `rows`. `lengths`: response tokens of
    each row. Every rank gets the same number of micro-batches, because all ranks gather and reduce together; the last
    ones of a rank may be empty."""
    mine = [place for place, row in enumerate(rows) if row in states]
    groups = packed_batches([lengths[place] for place in mine], max_tokens)
    counts = torch.zeros(ranks.world, dtype=torch.int64)
    counts[ranks.rank] = len(groups)
    missing = int(ranks.sum(counts).max()) - len(groups)
    return [sorted(mine[index] for index in group) for group in groups] + [[] for _ in range(missing)]


def values_on_states(
    forward: Callable[[States, int], Tensor], sequences: Sequences, states: Tensor, device: torch.device
) -> Tensor:
    """Values [b, r] of sequences whose states [n, H] are known.

    `forward` calls the whole network, which applies its head to the states, and returns the first `count` values. The
    head is not called alone, because FSDP waits for the optimizer only when its root begins a pass. Without a token, a
    dummy pass joins the collective operations of the other ranks.
    """
    count = len(states)
    values = forward(
        States(on_device(states if count else states.new_zeros(1, states.shape[1]), device)), max(1, count)
    )
    return sequences.scatter(values[:count]) if len(sequences.lengths) else values[:0, None]


def _bytes(states: Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return states.flatten().view(torch.uint8).numpy().data
