"""How a role becomes Ray actors: what they reserve, the environment of their processes, where they are."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import ray
from ray._private import state as ray_state
from ray.exceptions import ObjectLostError, RayActorError

import common
from actors.pool import OnEvent, Pool
from common.config import Placed, Replicated, TrainerConfig
from common.types import RolloutLostError

# Results of at least this many bytes stay in shared memory where they were made, and only references to them reach the
# caller: rollouts do, the few numbers beside them do not.
_INLINE_BYTES = 1024


class RayHost:
    """`actors.pool.Host` for replicas `role(name, *args, **kwargs)` that are Ray actors."""

    losses: tuple[type[BaseException], ...] = (RayActorError,)
    lost_values: tuple[type[BaseException], ...] = (ObjectLostError,)

    def __init__(self, role: type, cfg: Placed, *args: Any, **kwargs: Any) -> None:
        self._role, self._cfg = role, cfg
        self._args, self._kwargs = args, kwargs

    def create(self, name: str) -> Any:
        return actor(self._role, self._cfg, name=name).remote(name, *self._args, **self._kwargs)

    def kill(self, handle: Any) -> None:
        ray.kill(handle)

    def node(self, handle: Any) -> str | None:
        # Ray's own table, which has no public form: the process id is there once the actor has found room.
        entry = ray_state.actors(handle._actor_id.hex())
        return entry["Address"]["NodeID"] if entry and entry["Pid"] else None

    def leaving_nodes(self) -> Mapping[str, float]:
        # Ray Train watches for preemption through the same private call.
        deadlines_ms = ray_state.state.get_draining_nodes()
        return {node: ms / 1000 - time.time() if ms else float("inf") for node, ms in deadlines_ms.items()}

    def probe(self, handle: Any) -> Awaitable[Any]:
        return handle.ready.options(concurrency_group="health").remote()

    async def fetch(self, reference: Any) -> Any:
        try:
            return await reference
        except ObjectLostError as error:
            raise RolloutLostError(f"it was lost with the node it lay on: {error}") from error


async def start_pool(
    role: type,
    cfg: Replicated,
    *args: Any,
    startup_timeout_s: float,
    on_event: OnEvent = lambda event: None,
    **kwargs: Any,
) -> Pool:
    """Replicas `role(name, *args, **kwargs)`, named like Generator(0); returns when `cfg.min` of them are ready."""
    pool = Pool(role.__name__, RayHost(role, cfg, *args, **kwargs), cfg, on_event=on_event)
    return await pool.start(startup_timeout_s)


def actor(role: type, cfg: Placed, *, name: str | None = None) -> Any:
    """The Ray actor class of a role, with what its section reserves; `name` is what Ray's pages show."""
    return _remote(role).options(
        name=name, num_cpus=cfg.cpus, num_gpus=cfg.gpus, runtime_env={"env_vars": worker_environment(cfg)}
    )


@cache
def _remote(role: type) -> Any:
    # A concurrency group of its own is a thread of its own: probes are answered however busy the others are.
    return ray.remote(concurrency_groups={"health": 1})(role)


def worker_environment(cfg: Placed) -> dict[str, str]:
    """Environment of a role's process: quiet, and able to import what the driver can."""
    project = str(Path(common.__path__[0]).parent)
    passed_on = {key: os.environ[key] for key in ("HF_HUB_OFFLINE", "RATCHET_CACHE") if key in os.environ}
    environment = {
        "OMP_NUM_THREADS": str(cfg.threads),
        # Ours first: a user's own `common` beside the reward functions must not hide this one.
        "PYTHONPATH": os.pathsep.join(filter(None, [project, os.getcwd(), os.environ.get("PYTHONPATH")])),
        # glibc gives every large tensor back to the kernel and faults its pages in again at the next one: keeping them
        # makes an update 15 % faster (135M, two cores).
        "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "MALLOC_ARENA_MAX": "1",  # other threads' arenas cannot keep what is large
        "RAY_max_direct_call_object_size": str(_INLINE_BYTES),
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **passed_on,
    }
    if isinstance(cfg, TrainerConfig):
        # A small block in its thread's cache, which counts as used, keeps its two large free neighbours apart for good:
        # without that cache a learner takes 4 % less memory. An engine is slower without it.
        others = os.environ.get("GLIBC_TUNABLES")
        environment["GLIBC_TUNABLES"] = ":".join(filter(None, [others, "glibc.malloc.tcache_count=0"]))
    return environment
