"""The experience journal: one Arrow file per step, on disk before the learner sees the batch. Runs in the driver.

RUN/journal/step-000123.arrow is an Arrow IPC file of EXPERIENCE_SCHEMA, rows in admission order. pyarrow and pandas
read it directly, DuckDB through pyarrow (docs/metrics.md shows how). The schema's metadata holds, under the key
`ratchet`, a JSON object:

    schema          version of this layout (learner/loop/chain.py)
    step            number of this file, from 0
    time            when the step was written, in seconds since 1970 (UTC)
    policy_version  version that the learner held then
    prompts         state of the prompt stream after this batch (learner/loop/prompts.py); `outstanding` are the ids
                     that were issued, and are neither in this file nor in an earlier one
    voids           [sample id, reason, response, kind] of each `common.types.Void` since the previous file; `response`
                     is null if it is not known. If the id is also in `outstanding`, it is asked again
    previous        SHA-256 of the entry before it, in hex ("" for the first): the files form a chain

Other entries of the chain are notes (learner/loop/notes.py). learner/loop/chain.py writes and checks both kinds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.experience_table import EXPERIENCE_SCHEMA
from common.types import SampleId, Void
from learner.loop.chain import SCHEMA_VERSION, Chain, JournalError, Place
from learner.loop.notes import Note, identity, voided


@dataclass(frozen=True)
class JournalStep:
    """One step of the journal."""

    step: int
    table: pa.Table
    policy_version: int
    prompts: dict[str, Any]
    voids: tuple[tuple[str, str], ...]  # (sample id, reason)
    time: float  # when it was written, seconds since 1970
    void_kinds: tuple[str, ...] = ()  # the `Void.kind` of each void

    @property
    def sample_ids(self) -> list[str]:
        columns = (self.table[name].to_pylist() for name in ("epoch", "prompt_index", "replica"))
        return [str(SampleId(*row)) for row in zip(*columns, strict=True)]


class Journal:
    """Appends steps and notes in order. Each file is complete or absent. Opening a journal changes nothing on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._chain = Chain(directory)
        self._notes: list[Note] | None = None  # read when first asked for
        self._newest: JournalStep | None = None  # the step that this process wrote last

    @property
    def next_step(self) -> int:
        return self._chain.next_step

    @property
    def notes(self) -> Sequence[Note]:
        """All notes, in order."""
        if self._notes is None:
            self._notes = [self._read_note(place) for place in self._chain.places if not place.is_step]
        return self._notes

    @property
    def voided(self) -> dict[int, str]:
        """The steps that the learner skips, each with the reason."""
        return voided(self.notes)

    @property
    def identity(self) -> dict[str, str]:
        """Digests of everything that the run depends on, as it began or as the user accepted them."""
        return identity(self.notes)

    def open_for_writing(self) -> None:
        """Removes the files of a write that a crash interrupted. Only the owner of the run directory may call it,
        before `append` and `note`."""
        self._chain.remove_leftovers()

    def append(
        self, table: pa.Table, *, policy_version: int, prompts: dict[str, Any], voids: Sequence[Void] = ()
    ) -> int:
        """Writes the next step, syncs it to disk and renames it into place. Returns its number."""
        place, table, now = Place(self.next_step), table.combine_chunks(), time.time()
        metadata = {
            "schema": SCHEMA_VERSION,
            "step": place.step,
            "time": now,
            "policy_version": policy_version,
            "prompts": prompts,
            "voids": [[str(void.sample_id), void.reason, void.response, void.kind] for void in voids],
            "previous": self._chain.previous(place),
        }
        schema = EXPERIENCE_SCHEMA.with_metadata({"ratchet": json.dumps(metadata)})

        def write(file: Any) -> None:
            with pa.ipc.new_file(file, schema) as writer:
                writer.write_table(table)

        self._chain.write(place, write)
        about = (policy_version, prompts, tuple((str(void.sample_id), void.reason) for void in voids), now)
        self._newest = JournalStep(place.step, table, *about, tuple(void.kind for void in voids))
        return place.step

    def note(self, kind: str, **fields: Any) -> Note:
        """Writes a note before the next step, in the same way as a step."""
        place = self._chain.next_note()
        if (kind == "begin") != (place == Place(0, is_step=False)):
            raise ValueError(f"{place} is a note of kind {kind}; the journal's first entry is its only begin note")
        head = {"schema": SCHEMA_VERSION, "before_step": place.step, "number": place.note, "kind": kind}
        record = {**head, "time": time.time(), "previous": self._chain.previous(place), **fields}
        notes = list(self.notes)
        self._chain.write(place, lambda file: file.write((json.dumps(record, indent=2) + "\n").encode()))
        self._notes = [*notes, _note(record)]
        return self._notes[-1]

    def void(self, step: int, reason: str) -> Note:
        """Records that the batch of `step` is never learned from."""
        return self.note("void", step=step, reason=reason, sample_ids=self.read(step).sample_ids)

    def read(self, step: int) -> JournalStep:
        """Raises JournalError if the file is missing or damaged, or does not follow the entry before it."""
        if self._newest is not None and self._newest.step == step:
            return self._newest
        place = Place(step)
        self._chain.check(place)
        metadata, table = self._open(place, read=True)
        voids = tuple((sample_id, reason) for sample_id, reason, *_ in metadata["voids"])
        about = (metadata["policy_version"], metadata["prompts"], voids, metadata["time"])
        return JournalStep(step, table, *about, tuple(kind for *_, kind in metadata["voids"]))

    def last(self) -> JournalStep | None:
        """The newest step, if there is one."""
        return self.read(self.next_step - 1) if self.next_step else None

    def since(self, step: int) -> Iterator[JournalStep]:
        """Steps from `step` to the newest, in order."""
        for number in range(step, self.next_step):
            yield self.read(number)

    def verify(self) -> None:
        """Reads every entry. Raises JournalError if one is damaged, or does not follow the entry before it."""
        for place in self._chain.places:
            self._chain.check(place)
            if place.is_step:
                self._open(place)
            else:
                self._read_note(place)

    def digest(self, version: int) -> str:
        """SHA-256 of the newest entry that version `version` of the policy has learned from: the last step's file, or
        the `begin` note for version 0. "" if there is none."""
        places = self._chain.places
        if version == 0:
            return self._chain.digest(places[0]) if places and not places[0].is_step else ""
        return self._chain.digest(Place(version - 1)) if version <= self.next_step else ""

    def _open(self, place: Place, *, read: bool = False) -> tuple[dict[str, Any], pa.Table | None]:
        """The metadata of a step whose hash `check` has compared and, with `read`, its table."""
        path = self._chain.path(place)
        try:
            with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as file:
                table = file.read_all() if read else None
                metadata = json.loads(file.schema.metadata[b"ratchet"])
            schema, step, previous = (metadata[key] for key in ("schema", "step", "previous"))
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise JournalError(f"{path} cannot be read as a journal step: {error}") from error
        self._chain.check_header(place, schema, step, previous)
        return metadata, table

    def _read_note(self, place: Place) -> Note:
        path = self._chain.path(place)
        self._chain.check(place)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            note, schema, previous = _note(record), record["schema"], record["previous"]
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise JournalError(f"{path} cannot be read as a note: {error}") from error
        self._chain.check_header(place, schema, note.before_step, previous)
        if note.number != place.note:
            raise JournalError(f"{path} has number {note.number}: a file was changed, lost or moved")
        return note


_HEAD = ("schema", "before_step", "number", "kind", "time", "previous")


def _note(record: Mapping[str, Any]) -> Note:
    """Raises KeyError if a field is missing."""
    before_step, number, kind, when = (record[key] for key in _HEAD[1:5])
    return Note(before_step, number, kind, when, {key: value for key, value in record.items() if key not in _HEAD})
