"""The states of a trunk that does not train, computed once and kept on disk. Runs in every trainer rank.

Each rank has the rows that it computed, in an unnamed file of the run directory. The operating system removes the file
when the process ends, however it ends, and keeps in its file cache as much of it as there is free memory. A token takes
its hidden size times 2 or 4 bytes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class FrozenStates:
    """States of response tokens by row."""

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - open as long as this object lives
        self._places: dict[int, tuple[int, int]] = {}  # of each row: first token in the file, number of tokens
        self._tokens = 0
        self._like = torch.empty(0)  # has the width and the dtype of a state

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def add(self, rows: Sequence[int], lengths: Sequence[int], states: Tensor) -> None:
        """Keeps the states [n, H] of these rows, one row after another."""
        self._like = states[:0].cpu()
        self._file.write(_bytes(states.cpu()))
        self._file.flush()  # `of` reads past the buffer of this object
        for row, length in zip(rows, lengths, strict=True):
            self._places[row] = self._tokens, length
            self._tokens += length

    def of(self, rows: Sequence[int]) -> Tensor:
        """The states [n, H] of these rows, one row after another."""
        places = [self._places[row] for row in rows]
        states = self._like.new_empty(sum(length for _, length in places), *self._like.shape[1:])
        target, size, done = _bytes(states), self._like.element_size() * self._like.shape[-1], 0
        for first, length in places:
            part = target[done : done + size * length]
            if os.preadv(self._file.fileno(), [part], size * first) != len(part):
                raise OSError(f"the file with the states of the trunk is shorter than the {self._tokens} tokens in it")
            done += len(part)
        return states


def _bytes(states: Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return states.flatten().view(torch.uint8).numpy().data
