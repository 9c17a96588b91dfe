"""What may happen at a place in a run, and whether a resumed run then ends as if nothing had happened."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.durability.places import Place, before_every_line, chosen, code_of

Work = Callable[[Path], object]  # trains in a directory to the end


class DiskFull(OSError):
    """The error of a full disk that the test itself raised."""

    def __init__(self, place: Place) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))


def all_places(functions: list, start: Path | None, work: Work, scratch: Path) -> list[Place]:
    """The first, second, middle and last time that the work reaches each line of these functions."""
    seen: list[Place] = []
    with before_every_line(code_of(functions), seen.append):
        work(beginning(start, scratch / "places"))
    return chosen(seen)


def beginning(start: Path | None, directory: Path) -> Path:
    """A new directory that begins as `start`, or empty."""
    shutil.rmtree(directory, ignore_errors=True)
    if start is None:
        directory.mkdir(parents=True)
    else:
        shutil.copytree(start, directory, symlinks=True)
    return directory


def killed(functions: list, places: list[Place], start: Path | None, work: Work, scratch: Path) -> Iterator[tuple]:
    """Yields each place with the directory as a kill there leaves it.

    A kill stops a process between two lines. The files are then as they are at that moment: what Python has not passed
    to the operating system yet is lost, and no `finally` runs. So a copy of the directory, made at the place while the
    run goes on, is exactly what a kill leaves, and one run gives the copies for all places. A copy equal to an earlier
    one is yielded as None: a resumed run would do the same again.
    """
    wanted, copies, known = set(places), [], set()
    running = beginning(start, scratch / "running")

    def copy(place: Place) -> None:
        if place in wanted:
            kept = scratch / f"copy-{len(copies)}"
            shutil.copytree(running, kept, symlinks=True)
            copies.append((place, kept))

    with before_every_line(code_of(functions), copy):
        work(running)
    assert len(copies) == len(places), "a place of the first run was not reached again"
    for place, kept in copies:
        new = (digest := tree_digest(kept)) not in known
        known.add(digest)
        yield place, kept if new else None


def full_disks(functions: list, places: list[Place], start: Path | None, work: Work, scratch: Path) -> Iterator[tuple]:
    """Yields each place with the directory as a run leaves it in which that line failed for a full disk: here every
    `finally` did run. None as above."""
    known = set()
    for number, place in enumerate(places):
        directory = beginning(start, scratch / f"full-{number}")

        def fail(here: Place, at: Place = place) -> None:
            if here == at:
                raise DiskFull(at)

        try:
            with before_every_line(code_of(functions), fail):
                work(directory)
        except BaseException as error:
            if not _follows_from(error):
                raise AssertionError(f"{place}: another error than the disk's") from error
        new = (digest := tree_digest(directory)) not in known
        known.add(digest)
        yield place, directory if new else None


def _follows_from(error: BaseException | None) -> bool:
    while error is not None:
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def tree_digest(directory: Path) -> str:
    """Names and contents of everything in a directory."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(f"{path.relative_to(directory)}\0{path.is_dir()}\0".encode())
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file with its bytes."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(files)}
