"""The config of a run that continues, the settings that may change, and the directory that it continues in.

Runs in the driver, before anything slow is imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from common.config.description import changeable, recorded
from common.config.loading import AnyRoot, load_config
from common.config.training import AdamWConfig
from common.errors import UserError
from deploy.run.provenance import IN_A_JOB
from deploy.run.record import read_record


def resumed_config(
    root: type[AnyRoot],
    directory: Path,
    overrides: Sequence[str],
    changes: Sequence[str] | None = None,
    *,
    travels: bool,
) -> AnyRoot:
    """The config of the run in `directory` with `overrides` and `changes`. The journal records the changes; None if the
    command records none. Raises UserError if a setting may not change, or not in this way."""
    if not os.path.exists(directory / "config.toml"):
        raise UserError(f"{directory} is no run directory (no config.toml); name one that ratchet has made")
    names = tuple(changeable(root))
    sections = tuple(name for name in names if name.endswith("."))
    with_change = () if changes is None else tuple(recorded(root))
    fixed = [text for text in overrides if _key(text) not in names and not _key(text).startswith(sections)]
    if for_change := [text for text in fixed if _key(text) in with_change]:
        raise UserError(
            f"{', '.join(for_change)} decides what is learned: give it as --change {for_change[0]}, and the journal "
            "records the step from which the new value holds"
        )
    if fixed:
        recordable = f"with --change: {', '.join(with_change)}; " if with_change else ""
        raise UserError(
            f"{', '.join(fixed)} cannot change when a run continues: its earlier steps used the old value; "
            f"changeable: {', '.join(name.rstrip('.') for name in names)}; "
            f"{recordable}or start a new run"
        )
    changes = changes or ()
    if wrong := [text for text in changes if _key(text) not in with_change]:
        raise UserError(
            f"--change {wrong[0]}: only these settings can change in this way: {', '.join(with_change)}; others are "
            "given without --change, or are fixed"
        )
    before, after = (
        load_config(directory / "config.toml", given, root, keep_relative=travels)
        for given in ([], [*overrides, *changes])
    )
    optimizer: AdamWConfig | None = getattr(after, "optimizer", None)
    for key in ("num_steps", "epochs"):
        old, new = getattr(before, key, None), getattr(after, key, None)
        if old != new and optimizer is not None and optimizer.schedule != "constant":
            raise UserError(
                f"{key}={new} cannot change when a run continues: the {optimizer.schedule} schedule was planned for "
                f"{old}; start a new run"
            )
    return after


def _key(setting: str) -> str:
    return setting.partition("=")[0].strip()


def enter_starting_directory(run: Path) -> tuple[Path, list[Path]]:
    """Changes to the directory that the run was started from, because reward functions and the files they open are
    found from there. Returns a path of the run directory that is right there, and further directories with its modules.

    Stays in the current directory if the starting directory is gone, and in a job: a job has its own current directory.
    """
    record = read_record(run)
    started = str(record.get("directory") or os.curdir)
    if IN_A_JOB not in os.environ and os.path.isdir(started) and not os.path.samefile(started, os.curdir):
        run = run.absolute()
        os.chdir(started)
    modules = record.get("import_from")
    return run, [Path(name) for name in modules if isinstance(name, str)] if isinstance(modules, list) else []
