"""The experience journal: one Arrow file per step, on disk before the learner sees the batch. Runs in the driver.

RUN/journal/step-000123.arrow is an Arrow IPC file of EXPERIENCE_SCHEMA, rows in admission order. pyarrow and pandas
read it directly, DuckDB through pyarrow (docs/metrics.md shows how). step-000123.sha256 is for `sha256sum -c`.
The schema's metadata holds, under the key `ratchet`, a JSON object:

    schema          version of this layout: 4
    step            number of this file, from 0
    time            when the batch was cut, in seconds since 1970 (UTC)
    policy_version  version the learner held when the batch was cut
    prompts         state of the prompt stream after this batch (learner/loop/prompts.py); `outstanding` are the ids
                     that were issued, and are neither in this file nor in an earlier one
    voids           [sample id, reason, response] of rollouts that were voided since the previous file; `response` is
                     null if it is not known. If the id is also in `outstanding`, it is asked again
    previous        SHA-256 of the previous file, in hex ("" for step 0): the files form a chain
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.errors import UserError
from common.experience_table import EXPERIENCE_SCHEMA
from common.types import Void

# 2: origins of scores; 3: outstanding samples as ranges; 4: step, time, text of responses. An older layout is refused:
# the Ratchet that wrote it may compute other bits, so a replay could end in another state than the run had.
SCHEMA_VERSION = 4


class JournalError(UserError):
    """The journal on disk is not the chain that was written. The message names the file."""


@dataclass(frozen=True)
class JournalStep:
    """One step of the journal."""

    step: int
    table: pa.Table
    policy_version: int
    prompts: dict[str, Any]
    voids: tuple[tuple[str, str], ...]  # (sample id, reason)
    time: float  # when it was cut, seconds since 1970


class Journal:
    """Appends steps in order. Each file is complete or absent, and contains the hash of the previous file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.tmp"):  # a crash cut this write short; nobody has read it
            leftover.unlink()
        self.next_step = len(list(directory.glob("step-*.arrow")))
        for step in range(self.next_step):
            if not self._path(step).exists():
                raise JournalError(f"{self._path(step)} is missing: the journal has a gap; restore it from a copy")
        self._last_hash = self._hash(self.next_step - 1)

    def append(
        self, table: pa.Table, *, policy_version: int, prompts: dict[str, Any], voids: Sequence[Void] = ()
    ) -> int:
        """Writes the next step, syncs it to disk and renames it into place. Returns its number."""
        step = self.next_step
        metadata = {
            "schema": SCHEMA_VERSION,
            "step": step,
            "time": time.time(),
            "policy_version": policy_version,
            "prompts": prompts,
            "voids": [[str(void.sample_id), void.reason, void.response] for void in voids],
            "previous": self._last_hash,
        }
        path = self._path(step)
        staging = path.with_suffix(".tmp")
        with open(staging, "wb") as file:
            schema = EXPERIENCE_SCHEMA.with_metadata({"ratchet": json.dumps(metadata)})
            with pa.ipc.new_file(file, schema) as writer:
                writer.write_table(table.combine_chunks())
            file.flush()
            os.fsync(file.fileno())
        digest = _sha256(staging)
        with open(path.with_suffix(".sha256"), "w", encoding="ascii") as file:
            file.write(f"{digest}  {path.name}\n")
            file.flush()
            os.fsync(file.fileno())
        staging.rename(path)
        _sync_directory(self.directory)
        self._last_hash = digest
        self.next_step = step + 1
        return step

    def read(self, step: int) -> JournalStep:
        """Raises JournalError if the file is missing or damaged, or does not follow the previous file."""
        path = self._path(step)
        self._hash(step)
        try:
            with pa.OSFile(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            metadata = json.loads(table.schema.metadata[b"ratchet"])
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise JournalError(f"{path} cannot be read as a journal step: {error}") from error
        if metadata["schema"] != SCHEMA_VERSION:
            raise JournalError(
                f"{path} has schema {metadata['schema']}, this version of Ratchet writes {SCHEMA_VERSION}; continue "
                "with the version that wrote it"
            )
        if metadata["step"] != step or metadata["previous"] != self._hash(step - 1):
            raise JournalError(f"{path} does not follow step {step - 1}: a file was changed, lost or moved")
        voids = tuple((sample_id, reason) for sample_id, reason, _ in metadata["voids"])
        return JournalStep(step, table, metadata["policy_version"], metadata["prompts"], voids, metadata["time"])

    def last(self) -> JournalStep | None:
        """The newest step, if there is one."""
        return self.read(self.next_step - 1) if self.next_step else None

    def since(self, step: int) -> Iterator[JournalStep]:
        """Steps from `step` to the newest, in order."""
        for number in range(step, self.next_step):
            yield self.read(number)

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}.arrow"

    def _hash(self, step: int) -> str:
        """SHA-256 of a step's file, checked against its .sha256; "" for the step before the first."""
        if step < 0:
            return ""
        path = self._path(step)
        try:
            digest, written = _sha256(path), path.with_suffix(".sha256").read_text(encoding="ascii").split()[0]
        except (OSError, IndexError, UnicodeDecodeError) as error:
            raise JournalError(f"{path} or its .sha256 cannot be read: {error}") from error
        if digest != written:
            raise JournalError(f"{path} is damaged (SHA-256 {digest}, written {written}); restore it from a copy")
        return digest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
