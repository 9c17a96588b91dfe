"""Makes a role's plain class a Ray actor: its resources, its process's environment and cores, its meters.

Runs in the driver. The class that `_hosted` makes runs in the role's own process.
"""

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

# Results of at least this many bytes stay in the shared memory of their node, and the caller gets only a reference. So
# rollouts stay there, while the few numbers about them travel with the answer.
_INLINE_BYTES = 1024
# Variables of the driver that every role gets, on other nodes too.
_INHERITED = ("HF_HUB_OFFLINE", "RATCHET_CACHE", "VLLM_LOGGING_LEVEL")


def actor(role: type, cfg: Placed, label: str = "", **options: Any) -> Any:
    """The Ray actor class of a role, with the resources of its section. `label` names the actor in Ray's dashboard and
    tags its meters. By default this is the actor's first argument if it is text, such as Generator(2)."""
    environment = {"env_vars": worker_environment(cfg)}
    # A concurrency group has its own thread, so health probes are answered while all other threads are busy.
    groups = {"health": 1}
    # Ray reserves all resources of one actor on one node, so an engine over several GPUs needs no placement group.
    placed = ray.remote(
        num_cpus=cfg.cpus,
        num_gpus=cfg.gpus,
        label_selector=dict(cfg.labels),
        runtime_env=environment,
        concurrency_groups=groups,
        **options,
    )
    return placed(_hosted(role, label, cfg.cores))


def _hosted(role: type, label: str, cores: Collection[int]) -> type:
    """The role's class, in a process that is pinned to its cores and exports its meters."""

    class Hosted(role):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._label = label or (args[0] if args and isinstance(args[0], str) else role.__name__)
            if cores:
                pin(self._label, cores)
            meters.install(RayMeters(), role=role.__name__, replica=self._label)
            super().__init__(*args, **kwargs)

        def __repr__(self) -> str:  # shown in Ray's dashboard and logs
            return getattr(self, "_label", role.__name__)  # _label is missing if the creation failed

    Hosted.__name__, Hosted.__qualname__, Hosted.__module__ = role.__name__, role.__qualname__, role.__module__
    return Hosted


def pin(name: str, cores: Collection[int]) -> None:
    """Pins all threads of this process, and the threads they start later, to these cores. Raises UserError."""
    here = os.sched_getaffinity(0)
    if missing := sorted(set(cores) - here):
        raise UserError(
            f"{name}: cores {missing} are not among those that its machine offers, {sorted(here)}; change `cores` in "
            "its section, or leave it out"
        )
    pinned: set[int] = set()
    # Repeated until no thread is new: a thread that is not pinned yet may start another one meanwhile.
    while unpinned := {int(thread) for thread in os.listdir("/proc/self/task")} - pinned:
        for thread in unpinned:
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(thread, cores)
        pinned |= unpinned


def worker_environment(cfg: Placed) -> dict[str, str]:
    """Environment of a role's process: few log lines, and the same importable modules as in the driver.

    vLLM's own variables are set where it is imported, in actors/generation/vllm_settings.py.
    """
    inherited = {key: os.environ[key] for key in _INHERITED if key in os.environ}
    environment = {
        "OMP_NUM_THREADS": str(cfg.threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [package_root(), os.environ.get("PYTHONPATH")])),
        # Ray calls this function when the process starts, before it puts the driver's directory first on sys.path. So
        # Ratchet's packages are imported before a package of the user can hide them.
        ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{prepare_process.__module__}.{prepare_process.__name__}",
        IMPORT_FROM: json.dumps(users_directories()),
        # Without these, glibc returns every large tensor to the kernel, and the next one faults its pages in again.
        # Keeping them makes an update 15 % faster (135M, two cores).
        "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "MALLOC_ARENA_MAX": "1",  # otherwise every thread's arena may keep large free blocks
        "RAY_max_direct_call_object_size": str(_INLINE_BYTES),
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
        **inherited,
    }
    if cfg.gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # otherwise Ray lets a process that reserves no GPU see all of them
    if isinstance(cfg, TrainerConfig):
        if cfg.deterministic:
            environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch's deterministic mode needs it
        # Disable glibc's per-thread cache: a small freed block in it still counts as in use, so the large free blocks
        # around it never merge. Saves 4 % of a learner's memory. Learners only: it makes an engine slower.
        others = os.environ.get("GLIBC_TUNABLES")
        environment["GLIBC_TUNABLES"] = ":".join(filter(None, [others, "glibc.malloc.tcache_count=0"]))
    return environment
