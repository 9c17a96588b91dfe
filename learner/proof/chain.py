"""The journal as an auditor reads it: from the files alone, without the code that wrote them.

Runs in `ratchet audit`. learner/loop/chain.py and learner/loop/journal.py describe the files. This reader shares no
code with them. Otherwise the audit could not see an error in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 9
NOTE_KINDS = ("begin", "void", "change", "accept")
_STEP = re.compile(r"step-(\d{6,})\.(arrow|sha256|tmp)")
_NOTE = re.compile(r"note-(\d{6,})-(\d{3,})\.(json|sha256|tmp)")


class Violation(Exception):
    """The run directory breaks a rule of the audit. The text begins with the rule's name."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(rule, message)  # both, so that it can travel from a rank's process
        self.rule = rule

    def __str__(self) -> str:
        return ": ".join(self.args)


@dataclass(frozen=True)
class Step:
    """One batch. `about` is its metadata."""

    number: int
    digest: str
    table: pa.Table
    about: Mapping[str, Any]

    @property
    def sample_ids(self) -> list[str]:
        columns = (self.table[name].to_pylist() for name in ("epoch", "prompt_index", "replica"))
        return ["/".join(map(str, row)) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Note:
    """One note. `about` are all of its fields."""

    before_step: int
    number: int
    digest: str
    about: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.about["kind"])


def read_chain(journal: Path) -> Iterator[Step | Note]:
    """Every entry in order. Raises Violation if a file is missing, damaged or moved, or does not follow the one before
    it. Only one entry is in memory."""
    found = _entries(journal)
    if not found:
        raise Violation("chain", f"{journal} has no entry")
    previous, step, number = "", 0, 0  # the next entry is this step, or this note before it
    for place in sorted(found):
        is_step, path = place[1], found[place]
        expected = (step, True, 0) if is_step else (step, False, number)
        if place != expected:
            raise Violation("chain", f"{journal / _name(expected)} is missing: {path.name} is the next entry there")
        if is_step and previous == "":
            raise Violation("chain", f"{journal / _name((0, False, 0))} is missing, the note with which the run began")
        entry = _read_step(path, step) if is_step else _read_note(path, step, number)
        if entry.about["previous"] != previous:
            raise Violation("chain", f"{path} does not have the hash of the entry before it")
        if isinstance(entry, Note) and (entry.kind == "begin") != (previous == ""):
            raise Violation("chain", f"{path} is a note of kind {entry.kind}: the first entry is the only begin note")
        yield entry
        previous, step, number = entry.digest, step + is_step, 0 if is_step else number + 1


def read_step(journal: Path, number: int) -> Step:
    """One step by itself. Raises Violation."""
    return _read_step(journal / _name((number, True, 0)), number)


Place = tuple[int, bool, int]  # step, whether it is the step itself, number of the note before it


def _entries(journal: Path) -> dict[Place, Path]:
    """The files of all entries. Raises Violation for a hash whose entry is gone."""
    kinds: dict[Place, set[str]] = {}
    for name in os.listdir(journal) if journal.is_dir() else ():
        if match := _STEP.fullmatch(name):
            place = (int(match[1]), True, 0)
        elif match := _NOTE.fullmatch(name):
            place = (int(match[1]), False, int(match[2]))
        else:
            continue  # not a name that Ratchet gives
        kind = match[match.lastindex or 0]
        if name == f"{_name(place).rpartition('.')[0]}.{kind}":
            kinds.setdefault(place, set()).add(kind)
    for place, there in kinds.items():
        if there == {"sha256"}:  # a crash leaves it with a .tmp; alone it is the rest of an entry
            raise Violation("chain", f"{journal / _name(place)} is missing, but its .sha256 is there")
    return {place: journal / _name(place) for place, there in kinds.items() if there & {"arrow", "json"}}


def _name(place: Place) -> str:
    step, is_step, number = place
    return f"step-{step:06d}.arrow" if is_step else f"note-{step:06d}-{number:03d}.json"


def _read(path: Path) -> tuple[bytes, str]:
    """The bytes of an entry and their hash, which its .sha256 must have too."""
    try:
        data, written = path.read_bytes(), path.with_suffix(".sha256").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise Violation("chain", f"{path} or its .sha256 cannot be read ({error})") from None
    digest = hashlib.sha256(data).hexdigest()
    if written.split() != [digest, path.name]:
        raise Violation("chain", f"{path} is damaged: its SHA-256 is {digest}, its .sha256 says {written.strip()!r}")
    return data, digest


def _read_step(path: Path, step: int) -> Step:
    data, digest = _read(path)
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        about = json.loads(table.schema.metadata[b"ratchet"])
        named = about["schema"], about["step"]
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise Violation("chain", f"{path} is not a step of a journal ({type(error).__name__}: {error})") from None
    if named != (SCHEMA_VERSION, step):
        raise Violation("chain", f"{path} says that it is step {named[1]} in layout {named[0]}, not {SCHEMA_VERSION}")
    return Step(step, digest, table, about)


def _read_note(path: Path, before_step: int, number: int) -> Note:
    data, digest = _read(path)
    try:
        about = json.loads(data)
        named, kind = (about["schema"], about["before_step"], about["number"]), about["kind"]
    except (KeyError, TypeError, ValueError) as error:
        raise Violation("chain", f"{path} is not a note of a journal ({type(error).__name__}: {error})") from None
    if named != (SCHEMA_VERSION, before_step, number):
        raise Violation("chain", f"{path} says that it is note {named[2]} before step {named[1]} in layout {named[0]}")
    if kind not in NOTE_KINDS:
        raise Violation("chain", f"{path} is of kind {kind!r}, which is none of {', '.join(NOTE_KINDS)}")
    return Note(before_step, number, digest, about)
