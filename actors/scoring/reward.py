"""The reward service: asks every source for the score of a response, and adds up the weighted scores. Runs in each
reward replica."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from actors.scoring.kinds import Source, kind_of
from actors.scoring.secrets import Secrets
from common.config.actors import SourcesConfig
from common.config.sources import RewardSource
from common.metrics import meters
from common.model.files import load_tokenizer, resolve_model
from common.plain_text import one_line
from common.types import RawScore, RewardInput, Rollout, Score, ScoringError, Void
from common.user_code.errors import UserCodeError
from common.user_code.results import FLOAT32_MAX


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
        """`model` is the policy: its tokenizer decodes the responses, and `trust_remote_code` is its setting."""
        torch.set_num_threads(cfg.threads)
        self._name = name
        self._limit_s = cfg.answer_limit_s
        if isinstance(model, str):
            model = load_tokenizer(resolve_model(model, trust_remote_code=trust_remote_code))
        self._tokenizer = model
        self._sources = [(source, kind_of(source).make(source, cfg, secrets or {})) for source in cfg.sources]
        self._judges = [(judge, kind_of(judge).make(judge, cfg, secrets or {})) for judge in judges]
        meters.count("ratchet_scored_rollouts_total", 0)
        for source in (*cfg.sources, *judges):
            meters.count("ratchet_reward_voids_total", 0, source=source.name)

    async def ready(self) -> str:
        return self._name

    async def score(self, rollout: Rollout) -> Score | Void:
        """The score, or a Void that says which source failed on this response and how: a failure is never a zero."""
        return await self._ask(self._sources, rollout)

    async def judge(self, rollout: Rollout) -> Score | Void:
        """The score with the judges' components added to the sources'. Judges do not change the total."""
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
            if not abs(result.score) <= FLOAT32_MAX:  # NaN is refused here too
                return _void(rollout, answer, source, UserCodeError(f"returned {result.score:g}"))
            components[source.name], origins[source.name] = result.score, result.origin
            figures |= {f"{source.name}/{key}": value for key, value in result.figures.items()}
        weighted = [(source, components[source.name]) for source, _ in self._sources]
        total = sum(source.weight * score for source, score in weighted)
        if not abs(total) <= FLOAT32_MAX:
            terms = " + ".join(f"{source.weight:g} * {score:g} ({source.name})" for source, score in weighted)
            return Void(
                rollout.prompt.sample_id,
                f"the total of the weighted scores must fit float32: {terms} = {total:g}",
                response=answer.response,
            )
        meters.count("ratchet_scored_rollouts_total")
        return Score(total, components, origins, figures)

    async def _within_limit(self, call: Source, answer: RewardInput) -> RawScore:
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


def _void(rollout: Rollout, answer: RewardInput, source: RewardSource, error: Exception) -> Void:
    meters.count("ratchet_reward_voids_total", source=source.name)
    if not isinstance(error, UserCodeError):
        error = UserCodeError(f"raised {type(error).__name__}: {error}", fault=f"raised {type(error).__name__}")
    reason, fault = (f"reward source {source.name} {one_line(text)}" for text in (error.reason, error.fault))
    kept = ScoringError(fault, error.details, answer.prompt, answer.raw_response)
    return Void(rollout.prompt.sample_id, reason, response=answer.response, error=kept)
