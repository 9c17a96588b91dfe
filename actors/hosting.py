"""How a role's plain class becomes a Ray actor: what it reserves, and the environment of its process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

import common
from common.config import Placed, TrainerConfig


def actor(role: type, cfg: Placed) -> Any:
    """The Ray actor class of a role, with what its section reserves."""
    return ray.remote(role).options(
        num_cpus=cfg.cpus, num_gpus=cfg.gpus, runtime_env={"env_vars": worker_environment(cfg)}
    )


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
