"""Tells the user which ranks wait for a node. Runs in the driver."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ray._private import state as ray_state
from ray.exceptions import RayError

from common import node_waits
from common.config.training import TrainerConfig
from common.daemon_threads import answer, in_daemon_thread
from common.node_waits import NodeWaits


async def tell_waits(
    ranks: Mapping[str, Any],
    cfg: TrainerConfig,
    startup_timeout_s: float,
    tell: Callable[[str], None],
    enough_placed: Callable[[], None],
) -> None:
    """Looks once a second which of these ranks, given by name, have no node yet. Ends when each has one. `tell` gets a
    sentence for the user, and `enough_placed` is called when as many have a node as the group needs.

    If Ray's directory does not answer, this waits for its answer and tells nothing."""
    limit = f"{startup_timeout_s:g} s, ray.startup_timeout_s"
    if cfg.fewest_ranks < cfg.ranks:
        limit += f"; {cfg.room_wait_s:g} s once {cfg.fewest_ranks} of {cfg.ranks} ranks are there, learner.room_wait_s"
    messages, began, waiting = NodeWaits(cfg, limit, tell), time.monotonic(), dict(ranks)
    while waiting:
        await asyncio.sleep(node_waits.LOOK_EVERY_S)
        with suppress(RayError):  # the cluster cannot answer now
            placed = await answer(in_daemon_thread(_with_a_node, dict(waiting)))
            waiting = {name: rank for name, rank in waiting.items() if name not in placed}
        if len(ranks) - len(waiting) >= cfg.fewest_ranks:
            enough_placed()
        messages.look(dict.fromkeys(waiting, time.monotonic() - began))


def _with_a_node(ranks: Mapping[str, Any]) -> set[str]:
    return {name for name, rank in ranks.items() if has_node(rank)}


def has_node(rank: Any) -> bool:
    """True if the actor has found room. It blocks until Ray's directory answers."""
    # Ray's own table of actors, which has no public API. A process id in it means that the actor has found room.
    entry = ray_state.actors(rank._actor_id.hex())
    return bool(entry and entry["Pid"])
