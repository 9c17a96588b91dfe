"""Reads the journal and the credit files of a run, one step at a time. Runs anywhere.

If a file is missing or cannot be read, only its step is left out, and the page names the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.files import read_record, sha256

_NAME = re.compile(r"(?:step|note)-(\d{6,})(?:-\d{3})?\.(?:arrow|json|parquet)")


@dataclass(frozen=True)
class Step:
    """One step of the journal."""

    number: int
    path: Path
    table: pa.Table
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Lists:
    """A column of lists: row i is `values[offsets[i]:offsets[i + 1]]`, and None where `present` is False."""

    offsets: np.ndarray
    values: np.ndarray
    present: np.ndarray  # bool, one for each row

    def row(self, i: int) -> np.ndarray | None:
        return self.values[self.offsets[i] : self.offsets[i + 1]] if self.present[i] else None

    def sums(self) -> np.ndarray:
        """The sum of each row. A value that is not finite counts as 0. Otherwise all later rows would become NaN,
        because the sums are differences of one running total."""
        total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(self.values.astype(np.float64), posinf=0, neginf=0))])
        return total[self.offsets[1:]] - total[self.offsets[:-1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def lists(table: pa.Table | None, column: str) -> Lists | None:
    """None if the table lacks the column, or if all of its rows are null."""
    if table is None or column not in table.column_names or table[column].null_count == table.num_rows:
        return None
    array = pa.concat_arrays(table[column].chunks)
    present = array.is_valid().to_numpy(zero_copy_only=False)
    lengths = array.value_lengths().fill_null(0).to_numpy()
    values = array.flatten().to_numpy(zero_copy_only=False)  # without values that null rows may hide
    return Lists(np.concatenate([[0], np.cumsum(lengths)]), values, present)


class StepFiles:
    """The steps of a run's journal, and the credit file of each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.unreadable: list[str] = []  # names of files

    def numbers(self) -> list[int]:
        """Numbers of the steps that have a journal file."""
        return sorted(_number(path) for path in (self._directory / "journal").glob("step-*.arrow"))

    def credit_numbers(self) -> list[int]:
        """Numbers of the steps that have a journal file and a credit file."""
        credit = {_number(path) for path in (self._directory / "credit").glob("step-*.parquet")}
        return [number for number in self.numbers() if number in credit]

    def each(self, numbers: Sequence[int]) -> Iterator[Step]:
        for number in numbers:
            path = self._directory / f"journal/step-{number:06d}.arrow"
            try:
                with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
                    step = Step(number, path, file.read_all(), json.loads(file.schema.metadata[b"ratchet"]))
            except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
                self._note(path)
                continue
            yield step

    def credit(self, step: Step, columns: Sequence[str] | None = None) -> pa.Table | None:
        """The credit file of the step; None if there is none, or if it belongs to another journal file."""
        path = self._directory / f"credit/step-{step.number:06d}.parquet"
        if not path.exists():
            return None
        try:
            with pq.ParquetFile(path) as file:
                journal = json.loads(file.schema_arrow.metadata[b"ratchet"])["journal"]
                names = [name for name in columns or file.schema_arrow.names if name in file.schema_arrow.names]
                table = file.read(columns=names) if journal == sha256(step.path) else None
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            self._note(path)
            return None
        return table if table is not None and table.num_rows == step.table.num_rows else None

    def void_batches(self) -> dict[int, str]:
        """The steps whose batches were never learned from, each with the reason."""
        notes = (read_record(path.read_bytes()) for path in sorted((self._directory / "journal").glob("note-*.json")))
        voids = [note for note in notes if note and note.get("kind") == "void" and isinstance(note.get("step"), int)]
        return {note["step"]: str(note.get("reason", "")) for note in voids}

    def _note(self, path: Path) -> None:
        name = str(path.relative_to(self._directory))
        if name not in self.unreadable:
            self.unreadable.append(name)


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1
