"""How a role's plain class becomes a Ray actor: what it reserves, its process' environment and cores, its meters."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import ray
from ray._private import ray_constants

from actors.pool.ray_meters import RayMeters
from common.config.base import Placed
from common.config.training import TrainerConfig
from common.errors import UserError
from common.metrics import meters
from common.user_code.import_path import IMPORT_FROM, prepare_process, users_directories
from common.user_code.packages import package_root

# Results of at least this many bytes stay in shared memory where they were made, and only references to them reach the
# caller: rollouts do, the few numbers beside them do not.
_INLINE_BYTES = 1024


def actor(role: type, cfg: Placed, label: str = "", **options: Any) -> Any:
    """The Ray actor class of a role, with what its section reserves. An actor is shown, and its meters are tagged, by
    `label`, or by its first argument, its name such as Generator(2)."""
    environment = {"env_vars": worker_environment(cfg)}
    # All that one actor reserves is on one node: an engine over several GPUs needs no placement group.
    placed = ray.remote(num_cpus=cfg.cpus, num_gpus=cfg.gpus, runtime_env=environment, **options)
    return placed(_hosted(role, label, cfg.cores))


def _hosted(role: type, label: str, cores: Collection[int]) -> type:
    """The role, whose process keeps to its cores and exports its meters."""

    class Hosted(role):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._label = label or (args[0] if args and isinstance(args[0], str) else role.__name__)
            if cores:
                pin(self._label, cores)
            meters.install(RayMeters(), role=role.__name__, replica=self._label)
            super().__init__(*args, **kwargs)

        def __repr__(self) -> str:  # in Ray's dashboard and logs
            return getattr(self, "_label", role.__name__)  # asked for also where its creation failed

    Hosted.__name__, Hosted.__qualname__, Hosted.__module__ = role.__name__, role.__qualname__, role.__module__
    return Hosted


def pin(name: str, cores: Collection[int]) -> None:
    """Keeps every thread of this process, and those that they will begin, to these cores. Raises UserError."""
    here = os.sched_getaffinity(0)
    if missing := sorted(set(cores) - here):
        raise UserError(
            f"{name}: cores {missing} are not among those its machine has for it, {sorted(here)}; change `cores` in "
            "its section, or leave it out"
        )
    pinned: set[int] = set()
    # Until none is new: a thread that is not pinned yet may begin one meanwhile.
    while loose := {int(thread) for thread in os.listdir("/proc/self/task")} - pinned:
        for thread in loose:
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(thread, cores)
        pinned |= loose


def worker_environment(cfg: Placed) -> dict[str, str]:
    """Environment of a role's process: quiet, and able to import what the driver can."""
    passed_on = {key: os.environ[key] for key in ("HF_HUB_OFFLINE", "RATCHET_CACHE") if key in os.environ}
    environment = {
        "OMP_NUM_THREADS": str(cfg.threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [package_root(), os.environ.get("PYTHONPATH")])),
        # Called as the process begins. Only then Ray puts the driver's directory, where reward functions lie, on the
        # path, and first.
        ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{prepare_process.__module__}.{prepare_process.__name__}",
        IMPORT_FROM: json.dumps(users_directories()),
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
