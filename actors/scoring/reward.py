"""The reward service: the sources that score a response, and how several are combined."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from actors.scoring.function_source import FunctionSource
from actors.scoring.http_source import HttpSource
from actors.scoring.judge_source import JudgeSource
from actors.scoring.model_source import RewardModelSource
from actors.scoring.secrets import Secrets
from common.config.actors import SourcesConfig
from common.config.sources import (
    FunctionSourceConfig,
    HttpSourceConfig,
    JudgeSourceConfig,
    ModelSourceConfig,
    RewardSource,
)
from common.metrics import meters
from common.model.files import load_tokenizer, resolve_model
from common.plain_text import one_line
from common.types import Raw, RewardInput, Rollout, Score, ScoringError, Void
from common.user_code.calls import LARGEST, UserCodeError

Source = Callable[[RewardInput], Awaitable[Raw]]


def make_source(cfg: RewardSource, service: SourcesConfig, secrets: Secrets | None = None) -> Source:
    """One reward source as an async function."""
    match cfg:
        case ModelSourceConfig():
            return RewardModelSource(cfg, gpus=service.gpus)
        case HttpSourceConfig():
            return HttpSource(cfg, secrets)
        case JudgeSourceConfig():
            return JudgeSource(cfg, secrets)
        case FunctionSourceConfig():
            return FunctionSource(cfg, service)
    raise TypeError(f"no reward source is configured by {type(cfg).__name__}")


class Reward:
    """Scores rollouts by every configured source; `total = sum(weight * raw)`."""

    def __init__(
        self,
        name: str,
        cfg: SourcesConfig,
        *,
        model: str | PreTrainedTokenizerBase,
        judges: Sequence[RewardSource] = (),
        secrets: Secrets | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """`trust_remote_code`: of the model, whose tokenizer decodes the responses."""
        torch.set_num_threads(cfg.threads)
        self._name = name
        self._limit_s = cfg.answer_limit_s
        if isinstance(model, str):
            model = load_tokenizer(resolve_model(model, trust_remote_code=trust_remote_code))
        self._tokenizer = model
        self._sources = [(source, make_source(source, cfg, secrets)) for source in cfg.sources]
        self._judges = [(judge, make_source(judge, cfg, secrets)) for judge in judges]
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
        answer = self._answer(rollout)
        results = await asyncio.gather(*(self._within_limit(call, answer) for _, call in asked), return_exceptions=True)
        components: dict[str, float] = {}
        origins: dict[str, str] = {}
        figures: dict[str, float] = {}
        for (source, _), result in zip(asked, results, strict=True):
            if isinstance(result, Exception):
                return _void(rollout, answer, source, result)
            if isinstance(result, BaseException):
                raise result
            if not abs(result.score) <= LARGEST:  # also what is not a number
                return _void(rollout, answer, source, UserCodeError(f"returned {result.score:g}"))
            components[source.name], origins[source.name] = result.score, result.origin
            figures |= {f"{source.name}/{key}": value for key, value in result.figures.items()}
        total = sum(source.weight * components[source.name] for source, _ in self._sources)
        if not abs(total) <= LARGEST:
            shown = f"{_sum(self._sources, components)} = {total:g}"
            return Void(
                rollout.prompt.sample_id,
                f"the total of the weighted scores must fit float32: {shown}",
                response=answer.response,
            )
        meters.count("ratchet_scored_rollouts_total")
        return Score(total, components, origins, figures)

    async def _within_limit(self, call: Source, answer: RewardInput) -> Raw:
        limit = asyncio.timeout(self._limit_s)
        try:
            async with limit:
                return await call(answer)
        except TimeoutError:
            if not limit.expired():
                raise
            raise UserCodeError(
                f"gave no score within {self._limit_s:g} s (0.9 * timeout_s), waiting for its turn included"
            ) from None

    def _answer(self, rollout: Rollout) -> RewardInput:
        response_ids = rollout.response_ids.tolist()
        return RewardInput(
            prompt=rollout.prompt.text,
            messages=rollout.prompt.messages,
            response=self._tokenizer.decode(response_ids, skip_special_tokens=True),
            response_tokens=len(response_ids),
            finish_reason=rollout.finish_reason,
            fields=rollout.prompt.fields,
            raw_response=self._tokenizer.decode(response_ids),
            prompt_ids=rollout.prompt.token_ids.tolist(),
            response_ids=response_ids,
        )


def _sum(asked: Sequence[tuple[RewardSource, Source]], components: Mapping[str, float]) -> str:
    return " + ".join(f"{source.weight:g} * {components[source.name]:g} ({source.name})" for source, _ in asked)


def _void(rollout: Rollout, answer: RewardInput, source: RewardSource, error: Exception) -> Void:
    meters.count("ratchet_reward_voids_total", source=source.name)
    if not isinstance(error, UserCodeError):
        error = UserCodeError(f"raised {type(error).__name__}: {error}", fault=f"raised {type(error).__name__}")
    reason, fault = (f"reward source {source.name} {one_line(text)}" for text in (error.reason, error.fault))
    kept = ScoringError(fault, error.details, answer.prompt, answer.raw_response)
    return Void(rollout.prompt.sample_id, reason, response=answer.response, error=kept)
