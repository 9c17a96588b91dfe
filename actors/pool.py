"""Replicas of a role behind one async method: least-loaded choice, retry elsewhere when one dies, a limit on waiting.

The roles themselves are plain classes; here they become Ray actors.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from actors.engine import EngineDeadError
from common.config import Placed
from common.types import Prompt, Rollout, Score, Void

Call = Callable[[Any], Awaitable[Any]]  # given a replica's handle, starts the remote call


class RoleError(RuntimeError):
    """A role cannot do its work any more; the message names role, replica and what was asked."""


class Pool:
    """The replicas of one role. A replica that dies leaves the routing table at once and its calls go elsewhere."""

    def __init__(self, role: str, replicas: Mapping[str, Any], *, timeout_s: float) -> None:
        self._role = role
        self._replicas = dict(replicas)
        self._load = dict.fromkeys(replicas, 0)  # outstanding cost of each
        self._timeout_s = timeout_s
        self._last_error: BaseException | None = None

    @classmethod
    async def start(
        cls, role: str, replicas: int, create: Callable[[str], Any], *, timeout_s: float, startup_timeout_s: float
    ) -> Pool:
        """`create` turns a replica's name, such as Generator(0), into its actor. Waits until all are ready."""
        names = [f"{role}({index})" for index in range(replicas)]
        pool = cls(role, {name: create(name) for name in names}, timeout_s=startup_timeout_s)
        await pool.broadcast("start", lambda replica: replica.ready.remote())
        pool._timeout_s = timeout_s
        return pool

    async def call(self, what: str, call: Call, *, cost: int = 1) -> Any:
        """The answer of the least loaded replica. Raises RoleError when it takes too long or no replica is left."""
        while self._replicas:
            name = min(self._replicas, key=lambda name: self._load[name])
            self._load[name] += cost
            try:
                return await self._ask(name, self._replicas[name], what, call)
            except (RayActorError, EngineDeadError) as error:
                self._lose(name, error)
            finally:
                self._load[name] -= cost
        raise RoleError(f"{what}: no {self._role} replica is left; the last one died of: {self._last_error}")

    async def broadcast(self, what: str, call: Call) -> dict[str, Any]:
        """The answer of every replica. One that dies over it leaves the pool; raises RoleError if none is left."""
        asked = dict(self._replicas)
        answers = await asyncio.gather(
            *(self._ask(name, replica, what, call) for name, replica in asked.items()), return_exceptions=True
        )
        for name, answer in zip(asked, answers, strict=True):
            if isinstance(answer, (RayActorError, EngineDeadError)):
                self._lose(name, answer)
            elif isinstance(answer, BaseException):
                raise answer
        if not self._replicas:
            raise RoleError(f"{what}: no {self._role} replica is left; the last one died of: {self._last_error}")
        return {name: answer for name, answer in zip(asked, answers, strict=True) if name in self._replicas}

    async def _ask(self, name: str, replica: Any, what: str, call: Call) -> Any:
        try:
            return await asyncio.wait_for(call(replica), self._timeout_s)
        except TimeoutError as error:
            raise RoleError(f"{name} did not finish to {what} within {self._timeout_s:g} s") from error

    def _lose(self, name: str, error: Exception) -> None:
        self._last_error = error
        if replica := self._replicas.pop(name, None):
            ray.kill(replica)  # an engine may be dead in a process that lives


def actor(role_class: type, cfg: Placed, *, concurrency: int | None = None) -> Any:
    """The Ray actor class of a role, with what its section reserves."""
    options: dict[str, Any] = {
        "num_cpus": cfg.cpus,
        "num_gpus": cfg.gpus,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cfg.threads), **worker_environment()}},
    }
    if concurrency is not None:
        options["max_concurrency"] = concurrency
    return ray.remote(role_class).options(**options)


def worker_environment() -> dict[str, str]:
    """Environment of every worker process: quiet, and able to import what the driver can."""
    passed_on = {key: os.environ[key] for key in ("HF_HUB_OFFLINE", "RATCHET_CACHE") if key in os.environ}
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
        # glibc gives every large tensor back to the kernel and faults its pages in again at the next one: keeping them
        # makes an update 15 % faster (135M, two cores).
        "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **passed_on,
    }


class GeneratorPool:
    """`learner.roles.Generators` on Ray."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def generate(self, prompt: Prompt) -> Rollout:
        return await self._pool.call(
            f"answer prompt {prompt.sample_id}",
            lambda replica: replica.generate.remote(prompt),
            cost=len(prompt.token_ids),
        )

    async def load(self, weights: Any, version: int) -> None:
        """`weights` is the object reference of a WeightSet: each replica pulls it from the object store."""
        held = await self._pool.broadcast(
            f"load weights version {version}", lambda replica: replica.load_weights.remote(weights)
        )
        if wrong := {name: found for name, found in held.items() if found != version}:
            raise RoleError(f"wanted weights version {version} on every generator, but {wrong}")


class RewardPool:
    """`learner.roles.Reward` on Ray."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def score(self, rollout: Rollout) -> Score | Void:
        return await self._pool.call(
            f"score {rollout.prompt.sample_id}", lambda replica: replica.score.remote(rollout), cost=rollout.num_tokens
        )


class ReferencePool:
    """`learner.roles.Reference` on Ray."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def logprobs(self, rollout: Rollout) -> np.ndarray:
        return await self._pool.call(
            f"measure {rollout.prompt.sample_id}",
            lambda replica: replica.logprobs.remote(rollout),
            cost=rollout.num_tokens,
        )
