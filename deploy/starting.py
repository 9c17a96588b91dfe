"""Starts the pools of a command: which class becomes which pool, and with which arguments. Runs in the driver."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import ray

from actors.generation.engine import Engine
from actors.generation.generator import Generator
from actors.pool.membership import OnEvent
from actors.pool.pool import Pool
from actors.pool.ray_host import RayHost, start_pool
from actors.pool.roles import GeneratorPool
from actors.scoring.kinds import read_secrets
from actors.scoring.reference import ReferencePolicy
from actors.scoring.reward import Reward
from common.config.actors import GeneratorsConfig, SamplingConfig, SourcesConfig
from common.config.base import Pooled, RayConfig
from common.config.ppo import Config
from common.config.sources import RewardSource
from common.model.files import end_token_ids, resolve_model
from deploy.policy_files import PolicyFiles


class Starter:
    """Starts the pools of one run, all with the same start-up time limit and the same callback for pool events."""

    def __init__(self, cfg: RayConfig, on_event: OnEvent) -> None:
        self._timeout_s = cfg.startup_timeout_s
        self._on_event = on_event
        self.pools: list[Pool] = []

    async def pool(self, role: type, cfg: Pooled, *args: Any, **kwargs: Any) -> Pool:
        """Starts replicas `role(name, *args, **kwargs)`. Returns when `cfg.min` of them are ready."""
        limit = self._timeout_s
        pool = await start_pool(role, cfg, *args, startup_timeout_s=limit, on_event=self._on_event, **kwargs)
        self.pools.append(pool)
        return pool

    def stop(self) -> None:
        """Ends all pools."""
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
    ) -> GeneratorPool:
        """Starts generators for sequences of up to `max_tokens`, or of the model's context if that is shorter. With
        `sleeps` they can lend their GPU memory to the learner."""
        end_tokens = end_token_ids(policy.directory, policy.tokenizer)
        length = min(max_tokens, policy.size.context)
        make = partial(make_engine, policy.path, cfg, sampling, length, end_tokens, policy.trust_remote_code, sleeps)
        host = RayHost(Generator, cfg, seed, make, updates=cfg.updates)
        generators = GeneratorPool(host, cfg, on_event=self._on_event, response_tokens=sampling.max_new_tokens)
        self.pools.append(await generators.pool.start(self._timeout_s))
        return generators

    async def rollout_generators(self, policy: PolicyFiles, cfg: Config) -> GeneratorPool:
        """Starts the generators of a run of PPO, which may lend their GPU memory to the learner."""
        tokens, sleeps = cfg.max_sequence_tokens, cfg.lent_share > 0
        settings = cfg.generators, cfg.sampling
        return await self.generators(policy, *settings, seed=cfg.seed, max_tokens=tokens, sleeps=sleeps)

    async def rewards(self, cfg: SourcesConfig, *, policy: PolicyFiles, judges: Sequence[RewardSource] = ()) -> Pool:
        """Starts reward replicas for responses of this policy. `judges` do not count in the total."""
        secrets, trust = read_secrets([*cfg.sources, *judges]), policy.trust_remote_code
        return await self.pool(
            Reward, cfg, cfg, model=policy.path, judges=judges, secrets=secrets, trust_remote_code=trust
        )

    async def references(self, cfg: Config, *, model: str | None = None, temperature: float | None = None) -> Pool:
        """Starts reference replicas, with the model that PPO starts from and the temperature of sampling, unless others
        are given."""
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
) -> Engine:
    """Runs in each generator, so that only generators import vLLM."""
    from actors.generation.vllm_engine import VLLMEngine

    return VLLMEngine(
        resolve_model(path, trust_remote_code=trust_remote_code),
        cfg,
        sampling,
        trust_remote_code=trust_remote_code,
        sleeps=sleeps,
        max_model_len=max_model_len,
        end_token_ids=end_tokens,
        export_metrics=ray.is_initialized(),
    )
