"""The files of the journal as a chain: their names, their order, their hashes, and how one is written.

Runs in the driver. An entry is a step (step-000123.arrow) or a note (note-000123-000.json); notes of step 123 come
before it. Each entry contains the SHA-256 of the entry before it, and has its own SHA-256 in a .sha256 file, for
`sha256sum -c`. An entry is written to a .tmp file and synced, then its .sha256 is written, then it is renamed into
place. So a crash leaves a .tmp file, with or without a .sha256.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError
from common.files import sha256, sync

# 2: origins of scores; 3: outstanding samples as ranges; 4: step, time, text of responses; 5: notes; 6: turns; 7: new
# contexts, and kinds of voids; 8: advantages whitened in float64; 9: with normalise = "std" scores are clipped around
# their mean. An older number is refused: the version of Ratchet that wrote it computes other bits, so a replay could
# end in another state than the run had.
SCHEMA_VERSION = 9
_NAME = re.compile(r"(?:step-(\d{6,})|note-(\d{6,})-(\d{3,}))\.(arrow|json|sha256|tmp)")


class JournalError(UserError):
    """The journal on disk is not the chain that was written. The message names the file."""


@dataclass(frozen=True, order=True)
class Place:
    """The place of an entry in the chain. Places sort in the order of the chain."""

    step: int
    is_step: bool = True
    note: int = 0  # number of a note among those of its step

    @property
    def stem(self) -> str:
        return f"step-{self.step:06d}" if self.is_step else f"note-{self.step:06d}-{self.note:03d}"

    @property
    def name(self) -> str:
        return f"{self.stem}.{'arrow' if self.is_step else 'json'}"

    def __str__(self) -> str:
        return f"step {self.step}" if self.is_step else f"note {self.note} of step {self.step}"


class Chain:
    """The entries of one directory. Files with other names are ignored. Reading changes nothing on disk."""

    def __init__(self, directory: Path) -> None:
        """Raises JournalError if an entry is missing. Hashes are not read yet."""
        self.directory = directory
        self._digests: dict[Place, str] = {}
        found = _scan(directory)
        for place in [place for place, kinds in found.items() if kinds == {"sha256"}]:
            path = self.path(place)
            if not path.exists() and not path.with_suffix(".tmp").exists():
                raise JournalError(f"{path} is missing, but its .sha256 is there; restore it from a copy")
            found = _scan(directory)  # another process has just renamed it
        self.places = sorted(place for place, kinds in found.items() if kinds & {"arrow", "json"})
        self._check_gaps()

    def _check_gaps(self) -> None:
        expected = Place(0, is_step=False)
        for place in self.places:
            if place not in (expected, Place(expected.step)):
                missing = self.path(Place(expected.step) if place.step > expected.step else expected)
                raise JournalError(f"{missing} is missing: the journal has a gap; restore it from a copy")
            expected = _next_note(place)

    @property
    def next_step(self) -> int:
        """The number of steps."""
        return self._end().step

    def next_note(self) -> Place:
        """The place of a note that is written now."""
        return self._end()

    def _end(self) -> Place:
        return _next_note(self.places[-1]) if self.places else Place(0, is_step=False)

    def path(self, place: Place) -> Path:
        return self.directory / place.name

    def remove_leftovers(self) -> None:
        """Makes the directory if there is none, and removes the files of a write that a crash cut short, which nothing
        has read. Only the owner of the run directory may call it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for place, kinds in _scan(self.directory).items():
            if "tmp" in kinds:
                if place not in self.places:  # first: alone it would look like a lost file
                    self.path(place).with_suffix(".sha256").unlink(missing_ok=True)
                self.path(place).with_suffix(".tmp").unlink()

    def write(self, place: Place, write: Callable[[BinaryIO], object]) -> None:
        """Adds an entry at the end. `write` writes its bytes into a file."""
        path = self.path(place)
        staging = path.with_suffix(".tmp")
        with open(staging, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        digest = sha256(staging)
        with open(path.with_suffix(".sha256"), "w", encoding="ascii") as file:
            file.write(f"{digest}  {path.name}\n")
            file.flush()
            os.fsync(file.fileno())
        staging.rename(path)
        sync(self.directory)
        self.places.append(place)
        self._digests[place] = digest

    def digest(self, place: Place) -> str:
        """SHA-256 of an entry, read once."""
        return self._digests[place] if place in self._digests else self.check(place)

    def check(self, place: Place) -> str:
        """Reads the entry's file and returns its SHA-256. Raises JournalError if it is not the written one."""
        path = self.path(place)
        try:
            digest, written = sha256(path), path.with_suffix(".sha256").read_text(encoding="ascii").split()[0]
        except (OSError, IndexError, UnicodeDecodeError) as error:
            raise JournalError(f"{path} or its .sha256 cannot be read: {error}") from error
        if digest != written or self._digests.setdefault(place, digest) != digest:
            raise JournalError(f"{path} is damaged (SHA-256 {digest}, written {written}); restore it from a copy")
        return digest

    def previous(self, place: Place) -> str:
        """SHA-256 of the entry before this one; "" for the first."""
        index = bisect_left(self.places, place)
        return self.digest(self.places[index - 1]) if index else ""

    def check_header(self, place: Place, schema: object, number: object, previous: object) -> None:
        """Raises JournalError unless the layout, the place and the predecessor in an entry's header are right."""
        path = self.path(place)
        if schema != SCHEMA_VERSION:
            raise JournalError(
                f"{path} has schema {schema}, this version of Ratchet writes {SCHEMA_VERSION}; continue with the "
                "version that wrote it"
            )
        if number != place.step or previous != self.previous(place):
            before = self.places[bisect_left(self.places, place) - 1] if place != self.places[0] else "nothing"
            raise JournalError(f"{path} does not follow {before}: a file was changed, lost or moved")


def _next_note(place: Place) -> Place:
    """The place of the first note that may follow an entry."""
    return Place(place.step + 1, is_step=False) if place.is_step else Place(place.step, False, place.note + 1)


def _scan(directory: Path) -> dict[Place, set[str]]:
    """The kinds of files that each entry has in the directory."""
    found: dict[Place, set[str]] = {}
    for name in os.listdir(directory) if directory.is_dir() else ():
        if match := _NAME.fullmatch(name):
            step, of_step, note, kind = match.groups()
            place = Place(int(step)) if step else Place(int(of_step), False, int(note))
            if name in (place.name, f"{place.stem}.sha256", f"{place.stem}.tmp"):
                found.setdefault(place, set()).add(kind)
    return found
