"""RUN/set-aside: files of a run that differ from what it wrote. They are moved there, never deleted.

Runs in the driver.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from common.plain_text import one_line

README = "README.txt"


def set_aside(run: Path, path: Path, reason: str) -> str:
    """Moves a file or directory of the run to RUN/set-aside, whose README.txt gets the reason. Returns a message."""
    target = _free_name(run, path)
    note(run, f"{path.relative_to(run)} -> {target.name}: {reason}")  # first: no file moves without its reason
    path.rename(target)
    return f"{path} was set aside as {target}: {reason}"


def set_lines_aside(run: Path, path: Path, lines: list[bytes], reason: str) -> str:
    """Writes lines that are taken out of a file of the run to a file of RUN/set-aside. Returns a message."""
    target = _free_name(run, path)
    note(run, f"{len(lines)} line(s) of {path.relative_to(run)} -> {target.name}: {reason}")
    target.write_bytes(b"".join(line + b"\n" for line in lines))
    return f"{len(lines)} line(s) of {path} were set aside in {target}: {reason}"


def note(run: Path, text: str) -> None:
    """Adds a line to RUN/set-aside/README.txt."""
    directory = run / "set-aside"
    directory.mkdir(exist_ok=True)
    readme = directory / README
    begins = "" if readme.exists() else "Files of this run that differ from what it wrote. Nothing reads them.\n\n"
    with open(readme, "a", encoding="utf-8") as file:
        file.write(f"{begins}{time.strftime('%Y-%m-%d %H:%M:%S')}  {one_line(text)}\n")


def _free_name(run: Path, path: Path) -> Path:
    names = itertools.chain([path.name], (f"{path.name}-{n}" for n in itertools.count(2)))
    return next(target for name in names if not os.path.lexists(target := run / "set-aside" / name))
