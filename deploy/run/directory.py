"""The run directory: overwritten only with --force, used by one process at a time, and never emptied.

Runs in the driver. A command owns the directory before it reads or cleans anything in it. RUN/run.json is the first
file in it, and is written atomically: it marks the directory as made by Ratchet.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

from common.config.base import Root
from common.config.loading import load_config
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.errors import UserError
from common.files import write_durably
from deploy.run.leftovers import clear_scaling_state
from deploy.run.lock import LOCK, RunLock
from deploy.run.log import RunLog
from deploy.run.record import RECORD, add_start, read_record, write_first_record
from deploy.screen.console import complain

_LEFTOVER = re.compile(r"(run\.json|config\.toml)\.\d+\.tmp")  # left by a process that was killed as its run began
# Files of runs that older versions made, without a run.json.
_OLD_NAMES = {
    *("config.toml", "journal", "checkpoints", "metrics.jsonl", "pool-events.jsonl", "pool-state.json", "scale.json"),
    *("exported", "evaluations.jsonl", "prometheus.json", "answers", "policy", "adapter", "summary.json"),  # train
    *("pairs", "model", "calibration.png", "labelled.jsonl", "pairs.jsonl"),  # train-reward, sample-pairs
    *("answers.jsonl", "evaluation.json"),  # evaluate
}


def refuse_overwriting(directory: Path, *, force: bool, can_resume: bool = True) -> None:
    """Raises UserError unless a new run may begin in `directory`."""
    try:
        if not os.path.lexists(directory):
            _check_can_be_made(directory)
            return
        if not directory.is_dir():
            raise UserError(f"run directory {directory} is a file; name another")
        entries = _entries(directory)
    except OSError as error:
        raise UserError(f"run directory {directory} cannot be used ({error.strerror}); name another") from None
    if not entries or (entries == {RECORD} and is_run(directory)):  # nothing has begun
        if not os.access(directory, os.W_OK | os.X_OK):
            raise UserError(f"run directory {directory} cannot be written; change its permissions or name another")
        return
    if not is_run(directory):
        raise UserError(
            f"run directory {directory} has files that do not belong to a run (such as {min(entries)}); empty it or "
            "name another"
        )
    if not force:
        resume = f"continue it with --resume {quote(str(directory))}, "
        raise UserError(
            f"run directory {directory} exists; {resume if can_resume else ''}replace it with --force, or name another"
        )
    _check_can_be_moved(directory.resolve())


def is_run(directory: Path) -> bool:
    """True if Ratchet made this directory."""
    if read_record(directory):
        return True
    if not _entries(directory) <= _OLD_NAMES or len(_entries(directory)) == 1:
        return False
    for root in (Config, RewardTrainingConfig, PairSamplingConfig):
        with suppress(UserError):
            load_config(directory / "config.toml", [], root)
            return True
    return False


class RunDirectory:
    """A run directory that this process owns: two runs in one would corrupt its journal."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = RunLog()
        self._lock = RunLock(directory)

    def begin(self, cfg: Root, command: str, *, force: bool) -> None:
        """Makes it the directory of a new run. The directory of an old run is renamed first. If this process is killed,
        the directory has the old run, nothing, or the new run, but never a mixture."""
        refuse_overwriting(self.directory, force=force)  # again: another run may have used it meanwhile
        if _entries(self.directory) - {RECORD}:
            self._move_aside()
        for leftover in self.directory.iterdir():
            if leftover.name != LOCK:
                leftover.unlink()
        write_first_record(self.directory, command)
        write_durably(self.directory / "config.toml", cfg.to_toml())
        self.log.open(self.directory)

    def resume(self, cfg: Root) -> None:
        """Continues the run in it with these settings."""
        add_start(self.directory)
        # Before the config: with more steps to do, the summary of an earlier end would say that the run is finished.
        (self.directory / "summary.json").unlink(missing_ok=True)
        write_durably(self.directory / "config.toml", cfg.to_toml())
        self.log.open(self.directory)

    def release(self) -> None:
        self.log.close()
        self._lock.release()

    def _move_aside(self) -> None:
        real = self.directory.resolve()  # if the directory is a link, the link stays
        names = (real.with_name(f"{real.name}.old-{n}") for n in itertools.count(1))
        aside = next(path for path in names if not os.path.lexists(path))
        try:
            real.rename(aside)
            self._lock.follow(aside)
            make_private(real)
        except OSError as error:
            raise UserError(f"run directory {self.directory} cannot be renamed to {aside} ({error.strerror})") from None
        old, self._lock = self._lock, RunLock(self.directory)
        old.release()
        refuse_overwriting(self.directory, force=False)  # another process may have used the new directory already
        complain(f"the old run is now {aside}; remove it when you no longer need it")


@contextmanager
def run_owner(directory: Path, *, resume: bool = False, force: bool = False) -> Iterator[RunDirectory]:
    """Owns the directory of the run to continue, or of a new run, until the end. Raises UserError at once if another
    process owns it, or if no new run may begin in it."""
    if not resume:
        refuse_overwriting(directory, force=force)
    with sole_owner(directory, make=not resume) as owned:
        clear_scaling_state(directory)
        yield owned


@contextmanager
def sole_owner(directory: Path, *, make: bool = True) -> Iterator[RunDirectory]:
    """Owns the directory until the end. With `make` it makes a missing one, readable by its user only, and removes it
    at the end if nothing was written. Raises UserError if another process owns it."""
    owned, made = _owned(directory, make=make)
    try:
        yield owned
    finally:
        owned.release()
        for path in reversed(made):
            with suppress(OSError):  # it has files, such as the lock of another process
                path.rmdir()


def _owned(directory: Path, *, make: bool) -> tuple[RunDirectory, list[Path]]:
    """The directory, and every directory that was made for it, outermost first."""
    made: list[Path] = []
    while True:
        try:
            made += make_private(directory) if make else []
        except OSError as error:
            raise UserError(f"run directory {directory} cannot be made ({error.strerror}); name another") from None
        try:
            return RunDirectory(directory), made
        except FileNotFoundError:  # its last owner has removed it
            if not make:
                raise


def make_private(directory: Path) -> list[Path]:
    """Makes the directory if there is none, and returns the directories that were made, outermost first. It is readable
    by its user only, because it will have prompts and answers. An existing directory keeps its permissions."""
    missing = [path for path in (directory, *directory.parents) if not os.path.lexists(path)]
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    return missing[::-1]


def _entries(directory: Path) -> set[str]:
    """Names of the files in the directory, without its lock and leftovers of killed processes."""
    return {name for name in os.listdir(directory) if name != LOCK and not _LEFTOVER.fullmatch(name)}


def _check_can_be_made(directory: Path) -> None:
    """Makes the directory, with every missing parent, and removes it again, because permissions alone do not show
    whether this works. Raises UserError if it fails."""
    missing = [path for path in (directory, *directory.parents) if not os.path.lexists(path)]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
    except OSError as error:
        raise UserError(f"run directory {directory} cannot be made ({error.strerror}); name another") from None
    finally:
        for path in reversed(made):
            with suppress(OSError):  # another process has begun to use it
                path.rmdir()


def _check_can_be_moved(real: Path) -> None:
    """Raises UserError if the directory of the old run cannot be renamed."""
    here = Path.cwd()
    if real == here or real in here.parents:
        reason = "the current directory is in it"
    elif os.path.ismount(real):
        reason = "it is a mount point"
    elif not os.access(real.parent, os.W_OK | os.X_OK):
        reason = f"{real.parent} cannot be written"
    else:
        return
    raise UserError(f"--force would rename the run {real}, but {reason}; move it yourself, or name another --run")
