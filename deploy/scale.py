"""`ratchet scale`: more or fewer replicas while a run goes on.

The wish goes into RUN/scale.json, which the run follows; what there is it writes to RUN/pool-state.json.
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
from deploy.run.directory import is_owned
from deploy.screen.console import Output

_LOOK_EVERY_S = 0.5


async def follow_targets(directory: Path, pools: Sequence[Pool]) -> None:
    """Tells the pools what RUN/scale.json wishes, and writes down what there is whenever it changes. Runs until
    cancelled."""
    written = None
    while True:
        with suppress(ValueError, OSError):  # a file that is being mended, a disk that is full: the run goes on
            wishes = _read(directory / "scale.json")
            for pool in pools:
                pool.wish = max(pool.least, int(wishes.get(pool.role, pool.wish)))
            state = {pool.role: _state(pool) for pool in pools}
            if state != written:
                write_json(directory / "pool-state.json", state)
                written = state
        await asyncio.sleep(_LOOK_EVERY_S)


def clear_stale_state(directory: Path) -> None:
    """What an earlier process was told and told: no wish to this one, nor what it has."""
    for name in ("scale.json", "pool-state.json"):
        (directory / name).unlink(missing_ok=True)


def scale(directory: Path, wishes: Mapping[str, int], *, timeout_s: float = 10) -> dict[str, Any]:
    """Writes the wishes (role: replicas) down and returns RUN/pool-state.json once the run has heard them. Raises
    UserError."""
    if not is_owned(directory):
        raise UserError(f"no run is going on in {directory}; name the directory of one that is")
    state = _read(directory / "pool-state.json")
    for role, number in wishes.items():
        if role not in state:
            raise UserError(f"the run has no {role} pool, only {', '.join(state) or 'none yet'}; scale one of those")
        if number < (least := state[role]["min"]):
            raise UserError(
                f"{number} {role} replicas are fewer than the run needs ({least}, its setting `min`); wish for {least} "
                "or more, or stop the run and go on with another min"
            )
        if number > MOST_PROCESSES:
            raise UserError(f"{number} {role} replicas are more than a run may have ({MOST_PROCESSES}); wish for fewer")
    if wishes:
        write_json(directory / "scale.json", {**_read(directory / "scale.json"), **wishes})
    deadline = time.monotonic() + timeout_s
    while any(state.get(role, {}).get("wish") != number for role, number in wishes.items()):
        if time.monotonic() > deadline:
            raise UserError(f"the run in {directory} has not heard the wish within {timeout_s:g} s; does it hang?")
        time.sleep(_LOOK_EVERY_S / 2)
        state = _read(directory / "pool-state.json")
    return state


def show(state: Mapping[str, Any]) -> None:
    """The pools of a run as a table."""
    table = Table("role", "wished for", "ready", "replicas")
    for role, pool in state.items():
        replicas = ", ".join(f"{r['name']} {r['state']}" for r in pool["replicas"])
        table.add_row(role, str(pool["wish"]), str(sum(r["state"] == "ready" for r in pool["replicas"])), replicas)
    Output().print(table)


def _state(pool: Pool) -> dict[str, Any]:
    replicas = [{"name": r.name, "state": r.state, "node": r.node} for r in pool.replicas]
    return {"min": pool.least, "wish": pool.wish, "replicas": replicas}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
