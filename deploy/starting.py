"""Starts the pools of a command: the class and the arguments of each pool. Runs in the driver."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray

from actors.environments.environments import Environments
from actors.generation.engine import Engine
from actors.generation.generator import Generator
from actors.pool.episodes import EpisodePool
from actors.pool.membership import OnEvent
from actors.pool.pool import Pool
from actors.pool.ray_host import RayHost
from actors.pool.roles import GeneratorPool
from actors.scoring.kinds import read_secrets
from actors.scoring.reference import ReferencePolicy
from actors.scoring.reward import Reward
from common import node_waits
from common.config.actors import GeneratorsConfig, SamplingConfig, SourcesConfig
from common.config.base import Pooled, RayConfig
from common.config.ppo import Config
from common.config.sources import RewardSource
from common.model.files import end_token_ids, resolve_model
from common.node_waits import NodeWaits, RoomMessages
from common.precedence import Precedence
from common.types import Void
from deploy.policy_files import PolicyFiles
from learner.loop.roles import Generators


class Starter:
    """Starts the pools of one run, all with the same start-up time limit and the same callback for pool events."""

    def __init__(self, cfg: RayConfig, on_event: OnEvent, tell: Callable[[str], None] = lambda text: None) -> None:
        """`tell` gets a sentence for the user while a process that the run needs waits for a node."""
        self._timeout_s = cfg.startup_timeout_s
        self._on_event, self._tell = on_event, tell
        self._precedence = Precedence(cfg.startup_timeout_s / 2 if cfg.autoscaler else 0.0)
        self.pools: list[Pool] = []
        self._telling: list[asyncio.Task[None]] = []

    async def pool(self, role: type, cfg: Pooled, *args: Any, **kwargs: Any) -> Pool:
        """Starts replicas `role(name, *args, **kwargs)`. Returns when `cfg.min` of them are ready."""
        return await self.start(Pool(RayHost(role, cfg, *args, **kwargs), cfg, on_event=self._on_event), cfg)

    async def start(self, pool: Pool, cfg: Pooled) -> Pool:
        """Starts a pool with these settings. Until `stop`, tells the user which of its replicas wait for a node while
        the run needs them, and for which processes its extra replicas make room."""
        self.pools.append(pool)
        self._telling.append(asyncio.create_task(self._tell_waits(pool, cfg)))
        await pool.start(self._timeout_s, self._precedence)
        return pool

    def for_ranks(self) -> dict[str, Any]:
        """Arguments of a RankGroup of the same run."""
        return {"startup_timeout_s": self._timeout_s, "tell": self._tell, "precedence": self._precedence}

    async def _tell_waits(self, pool: Pool, cfg: Pooled) -> None:
        at_start = NodeWaits(cfg, f"{self._timeout_s:g} s, ray.startup_timeout_s", self._tell)
        later = NodeWaits(cfg, f"{cfg.max_shortage_s:g} s, max_shortage_s", self._tell)
        room = RoomMessages(pool.role, self._tell)
        while True:
            await asyncio.sleep(node_waits.LOOK_EVERY_S)
            now, members = time.monotonic(), pool.members
            waits = later if members.was_complete else at_start
            waits.look({replica.name: now - replica.since for replica in members.waiting})
            room.look(members.makes_room_for)

    def stop(self) -> None:
        """Ends all pools."""
        for telling in self._telling:
            telling.cancel()
        for pool in self.pools:
            pool.stop()

    async def generators(
        self,
        policy: PolicyFiles,
        cfg: GeneratorsConfig,
        sampling: SamplingConfig,
        *,
        seed: int,
        max_tokens: int,
        sleeps: bool = False,
        max_response: int | None = None,
    ) -> GeneratorPool:
        """Starts generators for sequences of up to `max_tokens`, or of the model's context if that is shorter. With
        `sleeps` they can lend their GPU memory to the learner. `max_response`: bound on the tokens of an episode;
        None: each response is one turn."""
        end_tokens = end_token_ids(policy.directory, policy.tokenizer)
        length, episodes = min(max_tokens, policy.size.context), max_response is not None
        make = partial(
            make_engine, policy.path, cfg, sampling, length, end_tokens, policy.trust_remote_code, sleeps, episodes
        )
        host = RayHost(Generator, cfg, seed, make, updates=cfg.updates, max_response=max_response)
        generators = GeneratorPool(host, cfg, on_event=self._on_event, response_tokens=sampling.max_new_tokens)
        await self.start(generators.pool, cfg)
        return generators

    async def writers(
        self, policy: PolicyFiles, cfg: Config, *, keep: Callable[[Void], Void], seed: int, sleeps: bool = False
    ) -> Generators:
        """Starts generators, and the environment of the config, if it has one. `keep` writes the error of a void
        episode to a file, and returns the void without it. `sleeps`: see `generators`."""
        environment = cfg.environment
        starting = self.generators(
            policy,
            cfg.generators,
            cfg.sampling,
            seed=seed,
            max_tokens=cfg.max_sequence_tokens,
            sleeps=sleeps,
            max_response=None if environment is None else environment.max_tokens,
        )
        if environment is None:
            return await starting
        generators, environments = await asyncio.gather(
            starting,
            self.pool(
                Environments,
                environment,
                environment,
                model=policy.path,
                prompts=cfg.prompts,
                sampling=cfg.sampling,
                seed=cfg.seed,
                trust_remote_code=policy.trust_remote_code,
            ),
        )
        return EpisodePool(generators, environments, keep=keep)

    async def rewards(self, cfg: SourcesConfig, *, policy: PolicyFiles, judges: Sequence[RewardSource] = ()) -> Pool:
        """Starts reward replicas for responses of this policy. `judges` do not count in the total."""
        secrets, trust = read_secrets([*cfg.sources, *judges]), policy.trust_remote_code
        return await self.pool(
            Reward, cfg, cfg, model=policy.path, judges=judges, secrets=secrets, trust_remote_code=trust
        )

    async def references(self, cfg: Config, *, model: str | None = None, temperature: float | None = None) -> Pool:
        """Starts reference replicas. By default they have the model that PPO starts from and the temperature of
        sampling."""
        return await self.pool(
            ReferencePolicy,
            cfg.reference,
            cfg.reference,
            model=model or cfg.model.path,
            temperature=temperature or cfg.sampling.temperature,
            trust_remote_code=cfg.model.trust_remote_code,
        )


def make_engine(
    path: str,
    cfg: GeneratorsConfig,
    sampling: SamplingConfig,
    max_model_len: int,
    end_tokens: list[int],
    trust_remote_code: bool,
    sleeps: bool,
    caches_prefixes: bool,
) -> Engine:
    """Runs in each generator, so that only generators import vLLM."""
    from actors.generation.vllm_engine import VLLMEngine

    return VLLMEngine(
        resolve_model(path, trust_remote_code=trust_remote_code),
        cfg,
        sampling,
        trust_remote_code=trust_remote_code,
        sleeps=sleeps,
        caches_prefixes=caches_prefixes,
        max_model_len=max_model_len,
        end_token_ids=end_tokens,
        export_metrics=ray.is_initialized(),
    )
