"""The reward service: the sources that score a response, and how several are combined."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

from transformers import PreTrainedTokenizerBase

from actors.http_reward import HttpSource
from common.config import RewardConfig, RewardSource
from common.functions import load_function
from common.models import load_tokenizer, resolve_model
from common.types import RewardInput, Rollout, Score, Void

Source = Callable[[RewardInput], Awaitable[float]]


def make_source(cfg: RewardSource) -> Source:
    """One reward source as an async function."""
    if cfg.function is None:
        return HttpSource(cfg)
    function = load_function(cfg.function, f"reward source {cfg.name}")

    async def call(answer: RewardInput) -> float:
        return float(function(answer))

    return call


class Reward:
    """Scores rollouts by every configured source; `total = sum(weight * raw)`."""

    def __init__(self, name: str, cfg: RewardConfig, *, model: str | PreTrainedTokenizerBase) -> None:
        self._name = name
        self._tokenizer = load_tokenizer(resolve_model(model)) if isinstance(model, str) else model
        self._sources = [(source, make_source(source)) for source in cfg.sources]

    def __repr__(self) -> str:
        return self._name

    async def ready(self) -> str:
        return self._name

    async def score(self, rollout: Rollout) -> Score | Void:
        """The score, or a Void that says which source failed on this response and how: a failure is never a zero."""
        answer = RewardInput(
            prompt=rollout.prompt.text,
            response=self._tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True),
            response_tokens=len(rollout.response_ids),
            finish_reason=rollout.finish_reason,
            fields=rollout.prompt.fields,
        )
        results = await asyncio.gather(*(call(answer) for _, call in self._sources), return_exceptions=True)
        components: dict[str, float] = {}
        for (source, _), raw in zip(self._sources, results, strict=True):
            if isinstance(raw, Exception):
                reason = f"reward source {source.name} raised {type(raw).__name__}: {raw}"
                return Void(rollout.prompt.sample_id, reason)
            if isinstance(raw, BaseException):
                raise raw
            if not math.isfinite(raw):
                return Void(rollout.prompt.sample_id, f"reward source {source.name} returned {raw}")
            components[source.name] = raw
        return Score(sum(source.weight * components[source.name] for source, _ in self._sources), components)
