"""`ratchet scale`: changes the number of replicas of a run in progress.

Runs in the driver, except `scale` and `show`, which run in the command's own process. The command writes target numbers
into RUN/scale.json; the run reads them, and writes the state of its pools into RUN/pool-state.json.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from actors.pool.pool import Pool
from common.config.base import MOST_PROCESSES
from common.errors import UserError
from common.files import write_json
from deploy.run.lock import is_owned
from deploy.screen.console import Output

_LOOK_EVERY_S = 0.5


async def follow_targets(directory: Path, pools: Sequence[Pool]) -> None:
    """Gives the pools the targets of RUN/scale.json, and writes RUN/pool-state.json when their state changes. Wakes up
    every _LOOK_EVERY_S, until it is cancelled."""
    written = None
    while True:
        with suppress(ValueError, OSError):  # a user is editing the file
            targets = _targets(directory)
            for pool in pools:
                members = pool.members
                target = min(targets.get(pool.role, members.target), MOST_PROCESSES)
                members.target = max(members.min_replicas, target)
        with suppress(OSError):  # the disk is full, for example: the run continues
            state = {pool.role: _state(pool) for pool in pools}
            if state != written:
                write_json(directory / "pool-state.json", state)
                written = state
        await asyncio.sleep(_LOOK_EVERY_S)


def scale(directory: Path, targets: Mapping[str, int], *, timeout_s: float = 10) -> dict[str, Any]:
    """Writes the targets, {role: replicas}, and returns RUN/pool-state.json once the run has read them. Raises
    UserError."""
    if not is_owned(directory):
        raise UserError(f"no run is in progress in {directory}; name the directory of one that is")
    state = _read(directory / "pool-state.json")
    if not state:
        raise UserError(
            f"{directory} has no pools that can be scaled; only ratchet train has some, once its screen says that it "
            "is ready"
        )
    for role, number in targets.items():
        if role not in state:
            raise UserError(f"the run has no {role} pool, only {', '.join(state)}; scale one of those")
        if number < (fewest := state[role]["min"]):
            raise UserError(
                f"{number} {role} replicas are fewer than the run needs ({fewest}, its setting `min`); ask for "
                f"{fewest} or more, or stop the run and continue it with another min"
            )
        if number > MOST_PROCESSES:
            raise UserError(f"{number} {role} replicas are more than a run may have ({MOST_PROCESSES}); ask for fewer")
    if targets:
        write_json(directory / "scale.json", {**_earlier_targets(directory), **targets})
    deadline = time.monotonic() + timeout_s
    while any(state.get(role, {}).get("target") != number for role, number in targets.items()):
        if time.monotonic() > deadline:
            late = f"the run in {directory} has not read the target within {timeout_s:g} s"
            raise UserError(f"{late}; if it hangs, stop it and continue it with --resume")
        time.sleep(_LOOK_EVERY_S / 2)
        state = _read(directory / "pool-state.json")
    return state


def show(state: Mapping[str, Any]) -> None:
    """The pools of a run as a table."""
    table = Table("role", "target", "ready", "replicas")
    for role, pool in state.items():
        replicas = ", ".join(f"{r['name']} {r['state']}" for r in pool["replicas"])
        table.add_row(role, str(pool["target"]), str(sum(r["state"] == "ready" for r in pool["replicas"])), replicas)
    Output().print(table)


def _state(pool: Pool) -> dict[str, Any]:
    replicas = [{"name": r.name, "state": r.state, "node": r.node} for r in pool.members.replicas]
    return {"min": pool.members.min_replicas, "target": pool.members.target, "replicas": replicas}


def _earlier_targets(directory: Path) -> dict[str, int]:
    """Raises UserError if a user has edited the file and it cannot be read any more."""
    try:
        return _targets(directory)
    except ValueError as error:
        path = directory / "scale.json"
        raise UserError(f"{path} cannot be read ({error}); delete it and ask again") from None


def _targets(directory: Path) -> dict[str, int]:
    """The targets in RUN/scale.json. Raises ValueError if the file has anything else."""
    targets = _read(directory / "scale.json")
    if not all(type(number) is int for number in targets.values()):
        raise ValueError("it must have a whole number for each role")
    return targets


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file. Raises ValueError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found
