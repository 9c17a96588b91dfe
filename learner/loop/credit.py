"""RUN/credit: what each update derived for each token, one Parquet file for each step. Runs in the driver.

`ratchet replay --credit` writes the same files in its rank 0. They are derived: they may be deleted, and a file that is
damaged or cannot be written stops no run. common/credit_table.py has the columns. The file's metadata holds, under the
key `ratchet`, a JSON object:

    schema   version of this layout
    step     number of the step, from 0
    journal  SHA-256 of the journal's file of this step
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.credit_table import CREDIT_SCHEMA, FLOATS, SCHEMA_VERSION
from common.files import replaced_file
from learner.loop.journal import Journal, JournalStep
from learner.loop.set_aside import set_aside

# Bits of a float's mantissa that are kept: an error of at most 1 in 2,048. The others are noise that no compression
# makes smaller: with all 23 bits a file would be almost twice as large.
KEPT_BITS = 10
_NAME = re.compile(r"step-(\d{6,})\.parquet")


class CreditFiles:
    """The directory RUN/credit of a run that is trained. Names that Ratchet does not give, and links, are ignored."""

    def __init__(self, run: Path, *, every: int, journal: Journal, report: Callable[[str], None]) -> None:
        self.directory = run / "credit"
        self._run, self._every, self._journal, self._report = run, every, journal, report
        self._failing = False  # the newest attempt to write failed

    def due(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0

    def check(self) -> None:
        """Sets aside every file whose step is not in this journal, or was not learned from. The journal may have been
        restored from an older copy."""
        for path in sorted(self.directory.glob("step-*.parquet")):
            if _NAME.fullmatch(path.name) and not path.is_symlink() and (fault := self._fault(path)):
                try:
                    self._report(set_aside(self._run, path, fault))
                except OSError as error:
                    self._report(f"{path} ({fault}) could not be set aside ({error}); remove it")

    def write(self, entry: JournalStep, derived: pa.Table) -> None:
        """Writes the file of a step. If the disk refuses it, reports that once, and the run continues without it."""
        try:
            write_credit(self.directory, entry, derived, journal=self._journal.digest(entry.step + 1))
        except (OSError, pa.ArrowException) as error:
            if not self._failing:
                self._report(
                    f"{credit_path(self.directory, entry.step)} could not be written ({error}); the run continues, and "
                    f"ratchet replay --credit {entry.step} writes it later"
                )
            self._failing = True
        else:
            self._failing = False

    def remove(self, step: int) -> None:
        """Removes the file of a step whose batch is void after all."""
        with suppress(OSError):
            credit_path(self.directory, step).unlink(missing_ok=True)

    def _fault(self, path: Path) -> str | None:
        """Why a file does not belong to this run; None if it does."""
        step = int(path.stem.removeprefix("step-"))
        try:
            about = read_about(path)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            return f"it is not a file of token values ({type(error).__name__}: {error})"
        if step >= self._journal.next_step or about.get("journal") != self._journal.digest(step + 1):
            return "it was derived from another journal"
        if step in self._journal.voided:
            return "nothing was learned from its batch"
        return None


def credit_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}.parquet"


def read_about(path: Path) -> dict[str, Any]:
    """The metadata of a file. Raises OSError, ArrowException, KeyError, TypeError or ValueError for a file of another
    layout."""
    about = json.loads(pq.read_metadata(path).metadata[b"ratchet"])
    if not isinstance(about, dict) or about.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"its layout is not {SCHEMA_VERSION}")
    return about


def write_credit(directory: Path, entry: JournalStep, derived: pa.Table, *, journal: str) -> None:
    """Writes the file of one step. A reader sees the whole file or none. `derived`: what `Learner.credit` returned;
    `journal`: SHA-256 of the step's file."""
    table, about = credit_table(entry, derived), {"schema": SCHEMA_VERSION, "step": entry.step, "journal": journal}
    directory.mkdir(parents=True, exist_ok=True)
    with replaced_file(credit_path(directory, entry.step)) as staging:
        pq.write_table(
            table.replace_schema_metadata({"ratchet": json.dumps(about)}),
            staging,
            compression="zstd",
            compression_level=1,
            use_dictionary=["policy_version.list.element"],
            use_byte_stream_split=[f"{field.name}.list.element" for field in CREDIT_SCHEMA if field.type == FLOATS],
            write_statistics=False,
        )


def credit_table(entry: JournalStep, derived: pa.Table) -> pa.Table:
    """The table of CREDIT_SCHEMA: the learner's columns, and copies of the journal's columns that identify each row."""
    columns = {
        **dict(zip(derived.column_names, derived.combine_chunks().columns)),
        "sample_id": pa.array(entry.sample_ids, pa.string()),
        "rollout_logprobs": entry.table["rollout_logprobs"],
        "policy_version": entry.table["policy_versions"],
    }
    arrays = [rounded(columns[field.name]) if field.type == FLOATS else columns[field.name] for field in CREDIT_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=CREDIT_SCHEMA)


def rounded(column: pa.ChunkedArray) -> pa.ListArray:
    """Rounds the mantissas of lists of float32 to KEPT_BITS bits, ties to even. The other bits become zeros."""
    lists = column.combine_chunks()
    dropped = 23 - KEPT_BITS
    bits = lists.values.to_numpy(zero_copy_only=False).view(np.uint32)
    bits = bits + (np.uint32((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)) >> dropped << dropped
    return pa.ListArray.from_arrays(lists.offsets, pa.array(bits.view(np.float32)), mask=lists.is_null())
