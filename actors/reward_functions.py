"""The reward service: the sources that score a response, and how several are combined."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import PreTrainedTokenizerBase

from actors.http_reward import HttpSource
from actors.reward_model import RewardModelSource
from common import meters
from common.config import FunctionSourceConfig, HttpSourceConfig, ModelSourceConfig, RewardSource, SourcesConfig
from common.functions import load_function
from common.models import load_tokenizer, resolve_model
from common.types import RewardInput, Rollout, Score, Void

Source = Callable[[RewardInput], Awaitable[tuple[float, str]]]  # raw score, and what gave it


def make_source(cfg: RewardSource, *, gpus: float = 0) -> Source:
    """One reward source as an async function."""
    match cfg:
        case ModelSourceConfig():
            return RewardModelSource(cfg, gpus=gpus)
        case HttpSourceConfig():
            return HttpSource(cfg)
        case FunctionSourceConfig():
            return FunctionSource(cfg)
    raise TypeError(f"no reward source is configured by {type(cfg).__name__}")


class FunctionSource:
    """A Python function, called in a thread of its own so that models and services work on meanwhile."""

    def __init__(self, cfg: FunctionSourceConfig) -> None:
        self._function: Callable[[RewardInput], float] = load_function(cfg.function, f"reward source {cfg.name}")
        self._origin = cfg.function
        self._thread = ThreadPoolExecutor(max_workers=1)  # one call at a time: few functions expect more

    async def __call__(self, answer: RewardInput) -> tuple[float, str]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._call, answer), self._origin

    def _call(self, answer: RewardInput) -> float:
        try:
            return float(self._function(answer))
        except StopIteration as error:  # no future can carry one
            raise RuntimeError("StopIteration: an iterator ran out") from error


class Reward:
    """Scores rollouts by every configured source; `total = sum(weight * raw)`."""

    def __init__(
        self,
        name: str,
        cfg: SourcesConfig,
        *,
        model: str | PreTrainedTokenizerBase,
        judges: Sequence[RewardSource] = (),
    ) -> None:
        torch.set_num_threads(cfg.threads)
        self._name = name
        self._tokenizer = load_tokenizer(resolve_model(model)) if isinstance(model, str) else model
        self._sources = [(source, make_source(source, gpus=cfg.gpus)) for source in cfg.sources]
        self._judges = [(judge, make_source(judge, gpus=cfg.gpus)) for judge in judges]
        meters.count("ratchet_scored_rollouts_total", 0)
        for source in (*cfg.sources, *judges):
            meters.count("ratchet_reward_voids_total", 0, source=source.name)

    async def ready(self) -> str:
        return self._name

    async def score(self, rollout: Rollout) -> Score | Void:
        """The score, or a Void that says which source failed on this response and how: a failure is never a zero."""
        return await self._ask(self._sources, rollout)

    async def judge(self, rollout: Rollout) -> Score | Void:
        """The score with the judges' components beside the sources'; they count nothing in the total."""
        return await self._ask([*self._sources, *self._judges], rollout)

    async def _ask(self, asked: Sequence[tuple[RewardSource, Source]], rollout: Rollout) -> Score | Void:
        answer = RewardInput(
            prompt=rollout.prompt.text,
            messages=rollout.prompt.messages,
            response=self._tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True),
            response_tokens=len(rollout.response_ids),
            finish_reason=rollout.finish_reason,
            fields=rollout.prompt.fields,
        )
        results = await asyncio.gather(*(call(answer) for _, call in asked), return_exceptions=True)
        components: dict[str, float] = {}
        origins: dict[str, str] = {}
        for (source, _), result in zip(asked, results, strict=True):
            if isinstance(result, Exception):
                return _void(rollout, source, f"raised {type(result).__name__}: {result}")
            if isinstance(result, BaseException):
                raise result
            raw, origin = result
            if not math.isfinite(raw):
                return _void(rollout, source, f"returned {raw}")
            components[source.name], origins[source.name] = raw, origin
        total = sum(source.weight * components[source.name] for source, _ in self._sources)
        meters.count("ratchet_scored_rollouts_total")
        return Score(total, components, origins)


def _void(rollout: Rollout, source: RewardSource, what: str) -> Void:
    meters.count("ratchet_reward_voids_total", source=source.name)
    return Void(rollout.prompt.sample_id, f"reward source {source.name} {what}")
