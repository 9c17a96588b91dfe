"""Whole runs in this process, for tests of what is written, scored and learned. Starting a run on Ray takes half a
minute, and one of these a second.

Commands, loop, pools, generators, services, environments and learner are the real ones. Three things are replaced: Ray
by `tests.fakes.LocalHost`, the learner's group by `OneRank`, and vLLM by tests/small_engine.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from common.config.base import Pooled
from common.model.files import resolve_model
from common.types import Manifest, PublishedBucket
from deploy import pass_training, session, starting, train, train_critic, train_reward
from deploy.plan.placement import Node
from tests.fakes import LocalHandle, LocalHost
from tests.small_engine import VLLMEngine

T = TypeVar("T")
MACHINE = Node("127.0.0.1", cpus=8, gpus=1, memory=64 << 30, gpu_memory=64 << 30, store=1 << 30)


@contextmanager
def in_one_process() -> Iterator[None]:
    """Commands start nothing but threads during the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "cluster", lambda *_: nullcontext([MACHINE]))
        patch.setattr(session, "role_output_to", lambda write: nullcontext())
        patch.setattr(starting, "RayHost", Host)
        patch.setattr(starting, "make_engine", make_engine)
        for module in (train, pass_training):
            patch.setattr(module, "actor", lambda role, *_: SimpleNamespace(remote=role))
        patch.setattr(train, "LearnerGroup", OneRank)
        patch.setattr(train_critic, "CriticTrainerGroup", OneRank)
        patch.setattr(train_reward, "RewardTrainerGroup", OneRank)
        patch.setattr(train, "dashboard", lambda: None)
        patch.setattr(train, "metrics_addresses", lambda: None)
        yield


class Host(LocalHost):
    """The replicas of a role, which end with their pool."""

    def __init__(self, role: type, cfg: Pooled, *args: Any, **kwargs: Any) -> None:
        super().__init__(role, *args, **kwargs)

    def kill(self, handle: LocalHandle, *, close: bool) -> Future[None]:
        if handle.role is not None and not handle.dead and hasattr(handle.role, "close"):
            handle.role.close()
        return super().kill(handle, close=close)


def make_engine(path: str, cfg: Any, sampling: Any, length: int, end_tokens: list[int], *_: Any) -> VLLMEngine:
    return VLLMEngine(resolve_model(path), cfg, sampling, max_model_len=length, end_token_ids=end_tokens)


class OneRank:
    """A group with one trainer, each of whose calls has a thread while the loop continues."""

    role = "Trainer"

    def __init__(self, create: Callable[[int], Any], *_: Any, deltas: bool = False, **__: Any) -> None:
        self._create, self._deltas = create, deltas
        self._turn = asyncio.Lock()
        self._base: Sequence[Any] = ()

    async def start(self) -> None:
        self._trainer = self._create(0)  # not in a thread: transformers loads one model at a time
        self._trainer.join(0, 1, "")

    def stop(self) -> None:
        """It ends with its last call."""

    @property
    def step(self) -> int:
        return self._trainer.step

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        """Any method of the trainer."""

        async def call(*args: Any) -> Any:
            async with self._turn:
                return await asyncio.to_thread(getattr(self._trainer, method), *args)

        return call

    async def publish(self) -> AsyncGenerator[PublishedBucket | Manifest, None]:
        async with self._turn:
            base, published = self._base, []
            items = iter(await asyncio.to_thread(lambda: list(self._trainer.publish(*base))))
            for item in items:
                if isinstance(item, Manifest):
                    self._base = published if self._deltas else ()
                    yield item
                else:
                    published.append(item)
                    yield PublishedBucket(item, best=next(items) if base else item)

    async def policy_logprobs(self, rollouts: Sequence[Any]) -> Any:
        return await self._measured("policy_logprobs", rollouts)

    async def ref_logprobs(self, rollouts: Sequence[Any]) -> Any:
        return await self._measured("ref_logprobs", rollouts)

    async def _measured(self, method: str, rollouts: Sequence[Any]) -> Any:
        fetched = [await each if isinstance(each, asyncio.Future) else each for each in rollouts]
        return await self.__getattr__(method)(*fetched)

    async def restore(self, directory: Path) -> None:
        await self.__getattr__("restore")(directory)

    async def unless_lost(self, work: Awaitable[T]) -> T:
        return await work
