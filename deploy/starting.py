"""Roles that several commands start: what an engine needs to know of a policy, and which class becomes which pool."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from transformers import PreTrainedTokenizerBase

from actors.generation.engine import Engine
from actors.generation.generator import Generator
from actors.pool.membership import OnEvent
from actors.pool.pool import Pool
from actors.pool.ray_host import start_pool
from actors.pool.roles import GeneratorPool
from actors.scoring.kinds import read_secrets
from actors.scoring.reference import ReferencePolicy
from actors.scoring.reward import Reward
from common.config.actors import GeneratorsConfig, PromptFormat, SamplingConfig, SourcesConfig
from common.config.base import RayConfig, Replicated
from common.config.ppo import Config
from common.config.sources import RewardSource
from common.data.prompt_records import PromptRecord, load_records
from common.errors import UserError
from common.model.files import check_policy_files, check_trainable_kind, end_token_ids, load_tokenizer, resolve_model
from common.model.kernels import install
from common.model.reward_head import is_reward_model
from common.model.size import ModelSize, model_size
from deploy.screen.console import complain


@dataclass(frozen=True)
class PolicyFiles:
    """A policy on disk, with what its config and tokenizer say."""

    path: str
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    size: ModelSize
    trust_remote_code: bool = False

    @classmethod
    def load(
        cls, path: str, setting: str = "model.path", *, trust_remote_code: bool = False, packed: bool = True
    ) -> PolicyFiles:
        """Raises UserError if there is no such policy, or with `packed` none that learner and reference can compute. A
        classifier gets no more than a look at its config: what is wrong with it depends on what becomes of it."""
        directory = resolve_model(path, setting, trust_remote_code=trust_remote_code)
        size = model_size(directory, setting)
        if not is_reward_model(directory):
            check_policy_files(directory, setting)
            if packed:
                check_trainable_kind(directory, setting, install=install)
        tokenizer = load_tokenizer(directory, setting)
        if not end_token_ids(directory, tokenizer, size.vocabulary, setting):
            print(
                f"warning: {setting} ({path}) has no end token, so every response runs to sampling.max_new_tokens; set "
                "eos_token in its tokenizer_config.json, or eos_token_id in its generation_config.json",
                file=sys.stderr,
            )
        return cls(path, directory, tokenizer, size, trust_remote_code)

    def decode(self, responses: Sequence[np.ndarray]) -> list[str]:
        """Texts without special tokens, as reward functions get them."""
        return list(self.tokenizer.batch_decode([ids.tolist() for ids in responses], skip_special_tokens=True))

    def load_prompts(
        self,
        source: str,
        cfg: PromptFormat,
        sampling: SamplingConfig,
        *,
        seed: int,
        setting: str,
    ) -> list[PromptRecord]:
        """Every prompt of a source, as this policy reads it. Tells the user what was dropped or cut."""
        return load_records(
            source,
            cfg,
            self.tokenizer,
            seed=seed,
            max_tokens=self.prompt_room(cfg.max_tokens, sampling),
            vocabulary=self.size.vocabulary,
            setting=setting,
            report=complain,
        )

    def prompt_room(self, max_tokens: int, sampling: SamplingConfig) -> int:
        """Longest prompt in tokens that leaves room for a response. Raises UserError if there is no room."""
        room = min(max_tokens, self.size.context - sampling.max_new_tokens)
        if room < 1:
            raise UserError(
                f"sampling.max_new_tokens ({sampling.max_new_tokens}) leaves no room for a prompt in the model's "
                f"context of {self.size.context} tokens; lower it"
            )
        return room


class Starter:
    """Starts pools of one run, all with its start-up time limit and its listener."""

    def __init__(self, cfg: RayConfig, on_event: OnEvent) -> None:
        self._timeout_s = cfg.startup_timeout_s
        self._on_event = on_event
        self.pools: list[Pool] = []

    async def pool(self, role: type, cfg: Replicated, *args: Any, **kwargs: Any) -> Pool:
        """Replicas `role(name, *args, **kwargs)`; returns when `cfg.min` of them are ready."""
        limit = self._timeout_s
        pool = await start_pool(role, cfg, *args, startup_timeout_s=limit, on_event=self._on_event, **kwargs)
        self.pools.append(pool)
        return pool

    def stop(self) -> None:
        """Ends all of them."""
        for pool in self.pools:
            pool.stop()

    async def generators(
        self, policy: PolicyFiles, cfg: GeneratorsConfig, sampling: SamplingConfig, *, seed: int, max_tokens: int
    ) -> GeneratorPool:
        """Engines for sequences of up to `max_tokens`, or the model's context."""
        end_tokens = end_token_ids(policy.directory, policy.tokenizer)
        length = min(max_tokens, policy.size.context)
        pool = await self.pool(
            Generator,
            cfg,
            seed,
            partial(make_engine, policy.path, cfg, sampling, length, end_tokens, policy.trust_remote_code),
            updates=cfg.updates,
        )
        return GeneratorPool(pool, response_tokens=sampling.max_new_tokens)

    async def rewards(self, cfg: SourcesConfig, *, policy: PolicyFiles, judges: Sequence[RewardSource] = ()) -> Pool:
        """Sources, and judges that count nothing, for responses of this policy."""
        secrets, trust = read_secrets([*cfg.sources, *judges]), policy.trust_remote_code
        return await self.pool(
            Reward, cfg, cfg, model=policy.path, judges=judges, secrets=secrets, trust_remote_code=trust
        )

    async def references(self, cfg: Config) -> Pool:
        """Of the model that PPO starts from."""
        temperature = cfg.sampling.temperature
        return await self.pool(
            ReferencePolicy,
            cfg.reference,
            cfg.reference,
            model=cfg.model.path,
            temperature=temperature,
            trust_remote_code=cfg.model.trust_remote_code,
        )


def make_engine(
    path: str,
    cfg: GeneratorsConfig,
    sampling: SamplingConfig,
    max_model_len: int,
    end_tokens: list[int],
    trust_remote_code: bool,
) -> Engine:
    """Called in the generator's process: only there is vLLM imported."""
    from actors.generation.vllm_engine import VLLMEngine

    return VLLMEngine(
        resolve_model(path, trust_remote_code=trust_remote_code),
        cfg,
        sampling,
        trust_remote_code=trust_remote_code,
        max_model_len=max_model_len,
        end_token_ids=end_tokens,
        export_metrics=ray.is_initialized(),
    )
