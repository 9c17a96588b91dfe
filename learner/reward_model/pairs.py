"""Preference pairs in an Arrow file: their format, access in any order, splits. Runs in the driver and in every rank.

The file is mapped, not loaded. So data may be larger than memory, and every epoch can shuffle all of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common.data.messages import Text

PAIR_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),  # JSON: text or chat messages
        ("prompt_hash", pa.int64()),
        ("shared_ids", pa.list_(pa.int32())),  # the tokens that both sequences begin with
        ("chosen_ids", pa.list_(pa.int32())),  # the rest of each sequence, at least one token
        ("rejected_ids", pa.list_(pa.int32())),
        ("margin", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, the first one preferred. Both sequences begin with `shared_ids`."""

    shared_ids: np.ndarray  # int32
    chosen_ids: np.ndarray  # int32, the rest of the preferred sequence
    rejected_ids: np.ndarray  # int32, the rest of the other
    margin: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of a forward pass over both sequences, which computes the shared tokens once."""
        return len(self.shared_ids) + len(self.chosen_ids) + len(self.rejected_ids)


class Pairs(Sequence[Pair]):
    """The pairs of an Arrow file, or some of its rows. Any order of access costs the same."""

    def __init__(self, path: Path, rows: np.ndarray | None = None, *, _file: Any = None) -> None:
        self._path = path
        self._batches = _file or pa.ipc.open_file(pa.memory_map(str(path)))  # readable even after the file was moved
        ends = np.cumsum([self._batches.get_batch(i).num_rows for i in range(self._batches.num_record_batches)])
        self._ends = ends.astype(np.int64)
        self._rows = np.arange(ends[-1] if len(ends) else 0) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, (int, np.integer)):
            return Pairs(self._path, self._rows[index], _file=self._batches)
        batch, row = self._locate(int(index))
        shared, chosen, rejected = (batch[name][row].values.to_numpy() for name in PAIR_SCHEMA.names[2:5])
        return Pair(shared, chosen, rejected, batch["margin"][row].as_py())

    def prompt(self, index: int) -> Text:
        """The prompt of the pair at `index`, as text or chat messages."""
        batch, row = self._locate(index)
        return json.loads(batch["prompt"][row].as_py())

    def prompt_hashes(self) -> np.ndarray:
        """int64 [N]: equal for pairs with the same prompt."""
        whole = [self._batches.get_batch(i)["prompt_hash"].to_numpy() for i in range(len(self._ends))]
        return (np.concatenate(whole) if whole else np.empty(0, np.int64))[self._rows]

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The record batch of the pair at `index`, and the row in it."""
        row = int(self._rows[index])
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self._batches.get_batch(number), row - (int(self._ends[number - 1]) if number else 0)


def split(pairs: Pairs, heldout: int, *, seed: int) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs: at least `heldout` held out, and all pairs of a prompt on the same side."""
    hashes = pairs.prompt_hashes()
    prompts, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    order = np.random.default_rng([seed, 0]).permutation(len(prompts))
    enough = int(np.searchsorted(np.cumsum(counts[order]), heldout)) + 1 if heldout else 0
    is_heldout = np.isin(which, order[:enough])
    return pairs[np.flatnonzero(~is_heldout)], pairs[np.flatnonzero(is_heldout)]


def without_prompts_of(pairs: Pairs, others: Pairs) -> Pairs:
    """The pairs whose prompt is not among those of `others`."""
    return pairs[np.flatnonzero(~np.isin(pairs.prompt_hashes(), others.prompt_hashes()))]
