"""The checkpoints of a run: which exist, which are due, and whether one is intact. Runs in the driver.

RUN/checkpoints/step-000100 holds the learner after 100 updates. A checkpoint is only a cache of the journal: it is
checked before it is used, and set aside if the check fails. The ranks write its other files
(learner/ranks/checkpoint.py); the driver then writes COMPLETE, a JSON object:

    schema    version of this layout: 1
    step      updates done
    journal   SHA-256 of the file of the journal's step before it; null without a journal
    voids     the steps that the learner has skipped
    identity  digests of everything that the run depended on then
    files     SHA-256 of each file, by name
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from common.errors import UserError
from common.files import sha256, sync, write_json
from learner.loop.chain import JournalError
from learner.loop.journal import Journal
from learner.loop.notes import identity
from learner.loop.set_aside import set_aside

T = TypeVar("T")

OPTIMIZER = "optimizer-"  # the files with the optimizer's state begin with this
COMPLETE = "COMPLETE"  # a file that is written last: a checkpoint without it was cut short by a crash
SCHEMA_VERSION = 1
_NAME = re.compile(r"step-(\d{6,})")
_FILE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")  # not "..", and no path


class CheckpointError(ValueError):
    """A checkpoint is damaged, or does not belong to this run. The message says how."""


class Checkpoints:
    """The directory RUN/checkpoints. Names that Ratchet does not give, and links, are ignored and never removed."""

    def __init__(self, directory: Path, *, every: int, keep: int, journal: Journal | None = None) -> None:
        self.run = directory.parent
        self._directory = directory
        self._every = every
        self._keep = keep
        self._journal = journal
        self.best: int | None = None  # a step whose checkpoint stays, however old it is

    def due(self, step: int, num_steps: int) -> bool:
        return step % self._every == 0 or step == num_steps

    def path(self, step: int) -> Path:
        return self._directory / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, in order."""
        return [step for step in self._written() if (self.path(step) / COMPLETE).is_file()]

    def newest(self) -> Path | None:
        """The newest complete checkpoint. Nothing is checked."""
        return self.path(steps[-1]) if (steps := self.steps()) else None

    def make_way(self, step: int) -> None:
        """Sets aside a file or link that has the name of this step's checkpoint. Without this, a save would write
        through a link."""
        path = self.path(step)
        if path.is_symlink() or path.is_file():
            set_aside(self.run, path, "it is not a directory, and a checkpoint needs its name")

    def complete(self, step: int, files: Mapping[str, str]) -> None:
        """Writes the marker of a checkpoint whose `files`, with these digests, are on disk."""
        sync(self.path(step))
        write_marker(self.path(step), {"step": step, **self._history(step), "files": dict(files)})
        sync(self._directory)

    def check(self, step: int) -> None:
        """Raises CheckpointError unless a complete checkpoint is intact and agrees with the journal; JournalError if it
        contains steps that the journal has lost."""
        marker = self.check_files(step)
        if self._journal is not None and step > self._journal.next_step:
            raise JournalError(
                f"{self.path(step)} holds {step} steps, but the journal only {self._journal.next_step}: its newest "
                "files were lost; restore them, or remove that checkpoint to continue from the journal alone"
            )
        for key, value in self._history(step).items():
            if marker[key] != value:
                raise CheckpointError(_DIFFERENT[key].format(step - 1))

    def check_files(self, step: int, *, optimizer: bool = True) -> dict[str, Any]:
        """Reads every file of a complete checkpoint, those of the optimizer only if asked, and returns the marker.
        Raises CheckpointError if a file is damaged or missing."""
        marker = read_marker(self.path(step))
        if marker["step"] != step:
            raise CheckpointError(f"it was written as step {marker['step']}")
        for name, digest in marker["files"].items():
            if optimizer or not name.startswith(OPTIMIZER):
                check_file(self.path(step) / name, digest)
        return marker

    def prune(self) -> None:
        """Removes all checkpoints except the best one, the newest `keep` complete ones, and the newest `keep` that
        training can continue from; also those that a crash cut short."""
        kept = {*self.steps()[-self._keep :], *self.usable_steps()[-self._keep :], self.best}
        for step in self._written():
            if step not in kept:
                (self.path(step) / COMPLETE).unlink(missing_ok=True)  # first: what is left after a crash must not count
                # Another program may have a file open on NFS. Then the next call removes the rest.
                shutil.rmtree(self.path(step), ignore_errors=True)

    def usable_steps(self) -> list[int]:
        """The steps of the complete checkpoints that training can continue from, in order."""
        return [step for step in self.steps() if self._is_usable(step)]

    def _is_usable(self, step: int) -> bool:
        with suppress(CheckpointError):
            return self.can_continue(step)
        return False

    def can_continue(self, step: int) -> bool:
        """False if the optimizer's state was dropped. Raises CheckpointError."""
        return any(name.startswith(OPTIMIZER) for name in read_marker(self.path(step))["files"])

    def drop_optimizers(self) -> None:
        """Removes the optimizer's state from every checkpoint. Such a checkpoint can be exported, but training cannot
        continue from it."""
        for directory in map(self.path, self.steps()):
            with suppress(CheckpointError):
                marker = read_marker(directory)
                files = {name: hash for name, hash in marker["files"].items() if not name.startswith(OPTIMIZER)}
                write_marker(directory, {**marker, "files": files})
                for path in directory.glob(f"{OPTIMIZER}*"):
                    path.unlink()

    def _written(self) -> list[int]:
        """The steps that have a checkpoint, complete or not, in order."""
        names = (path.name for path in self._directory.glob("step-*") if path.is_dir() and not path.is_symlink())
        steps = ((int(match[1]), name) for name in names if (match := _NAME.fullmatch(name)))
        return sorted(step for step, name in steps if name == self.path(step).name)  # as numbers, not as names

    def _history(self, step: int) -> dict[str, Any]:
        """The fields of this step's marker that follow from the journal."""
        if self._journal is None:
            return {"journal": None, "voids": [], "identity": {}}
        return {
            "journal": self._journal.digest(step),
            "voids": sorted(voided for voided in self._journal.voided if voided < step),
            "identity": identity(self._journal.notes, before_step=step - 1),
        }


_DIFFERENT = {
    "journal": "it does not follow step {} of this run's journal",
    "voids": "the batches that it has skipped are not those that the journal says are void",
    "identity": "it was written with another model, other prompts or other reward sources",
}


def write_marker(directory: Path, marker: Mapping[str, Any]) -> None:
    """Writes the marker of a checkpoint, without its schema. From now on the checkpoint counts."""
    write_json(directory / COMPLETE, {"schema": SCHEMA_VERSION, **marker}, durably=True)


def read_marker(directory: Path) -> dict[str, Any]:
    """The marker of a checkpoint, without its schema. Raises CheckpointError if it cannot be read."""
    try:
        marker = json.loads((directory / COMPLETE).read_text(encoding="utf-8"))
        schema, step, files = marker["schema"], marker["step"], marker["files"]
        known = {key: marker[key] for key in ("journal", "voids", "identity")}
        names = list(files.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"its {COMPLETE} cannot be read ({type(error).__name__}: {error})") from None
    if schema != SCHEMA_VERSION:
        raise CheckpointError(f"it has schema {schema}, this version of Ratchet writes {SCHEMA_VERSION}")
    if not names or not all(_FILE.fullmatch(name) and isinstance(digest, str) for name, digest in names):
        raise CheckpointError(f"its {COMPLETE} names files that no checkpoint has")
    return {"step": step, **known, "files": files}


def check_file(path: Path, digest: str) -> None:
    """Raises CheckpointError unless it is a file, not a link, with this SHA-256."""
    try:
        found = sha256(path) if path.is_file() and not path.is_symlink() else None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from None
    if found is None:
        raise CheckpointError(f"{path.name} is missing")
    if found != digest:
        raise CheckpointError(f"{path.name} is damaged (SHA-256 {found}, written {digest})")


class Saves(Protocol):
    """The part of a learner group that checkpoints need."""

    @property
    def step(self) -> int: ...

    async def save(self, directory: Path) -> Mapping[str, str]: ...

    async def restore(self, directory: Path) -> None: ...


async def restore_newest(
    learner: Saves,
    checkpoints: Checkpoints,
    *,
    num_steps: int,
    report: Callable[[str], None],
    prepare: Callable[[int], Awaitable[None]] | None = None,
) -> bool:
    """Restores the newest intact checkpoint that training can continue from, and sets damaged newer ones aside. Returns
    False if there is none. `prepare` is called before, with its step. Raises UserError for one that does not fit the
    network."""
    for step in reversed(checkpoints.steps()):
        path = checkpoints.path(step)
        try:
            await asyncio.to_thread(checkpoints.check, step)
            if step < num_steps and not checkpoints.can_continue(step):
                continue
        except CheckpointError as error:
            report(set_aside(checkpoints.run, path, str(error)))
            continue
        if prepare is not None:
            await prepare(step)
        try:
            await learner.restore(path)
        except UserError as error:  # some of its tensors may be in the network now
            aside = set_aside(checkpoints.run, path, str(error))
            raise UserError(f"{aside}; continue with --resume: an earlier one takes its place") from error
        return True
    return False


async def save(learner: Saves, checkpoints: Checkpoints) -> None:
    """Writes a checkpoint of the learner's step, and removes old ones."""
    step = learner.step
    checkpoints.make_way(step)
    files = await learner.save(checkpoints.path(step))
    await asyncio.to_thread(checkpoints.complete, step, files)
    await asyncio.to_thread(checkpoints.prune)


async def save_now(learner: Saves, checkpoints: Checkpoints) -> None:
    """Writes a checkpoint of the learner's step, unless there is one that training can continue from, or nothing was
    learned yet."""
    if learner.step and learner.step not in checkpoints.usable_steps():
        await save(learner, checkpoints)


async def completed(work: Coroutine[Any, Any, T]) -> T:
    """Waits for the end of `work`, even if the caller is cancelled meanwhile. Then raises the cancellation."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
