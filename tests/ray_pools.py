"""Pools of Ray actors for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from actors.pool.membership import OnEvent
from actors.pool.pool import Pool
from actors.pool.ray_host import RayHost
from common.config.base import Replicated


async def start_pool(
    role: type,
    cfg: Replicated,
    *args: Any,
    startup_timeout_s: float,
    on_event: OnEvent = lambda event: None,
    **kwargs: Any,
) -> Pool:
    """A pool of replicas `role(name, *args, **kwargs)`, named like Reward(0); returns when `cfg.min` are ready."""
    return await Pool(RayHost(role, cfg, *args, **kwargs), cfg, on_event=on_event).start(startup_timeout_s)
