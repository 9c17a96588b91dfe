"""The reward service: asks every source for the score of a response, and adds up the weighted scores. Runs in each
reward replica."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from actors.scoring.failures import finite_score, void_of
from actors.scoring.kinds import Source, kind_of
from actors.scoring.secrets import Secrets
from common.config.actors import SourcesConfig
from common.config.sources import RewardSource
from common.metrics import meters
from common.model.files import load_tokenizer, resolve_model
from common.turns import turns_for_reward
from common.types import RawScore, RewardInput, Rollout, Score, Void
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
        """The score, or a Void with the source that failed and the reason: a failure never counts as a score of 0."""
        return await self._ask(rollout, ())

    async def judge(self, rollout: Rollout) -> Score | Void:
        """The score with the judges' components added to the sources'. Judges do not change the total. A judge
        that fails has no component, and its Void is in `judge_voids`."""
        return await self._ask(rollout, self._judges)

    async def _ask(self, rollout: Rollout, judges: Sequence[tuple[RewardSource, Source]]) -> Score | Void:
        answer, asked = self._answer(rollout), [*self._sources, *judges]
        calls = (finite_score(call, answer, self._limit_s) for _, call in asked)
        results = await asyncio.gather(*calls, return_exceptions=True)
        found: dict[str, RawScore] = {}
        judge_voids: dict[str, Void] = {}
        for number, ((source, _), result) in enumerate(zip(asked, results, strict=True)):
            is_judge = number >= len(self._sources)
            if isinstance(result, Exception):
                void = void_of(rollout.prompt.sample_id, answer, source.name, result, is_judge=is_judge)
                if not is_judge:
                    return void
                judge_voids[source.name] = void
            elif isinstance(result, BaseException):
                raise result
            else:
                found[source.name] = result
        weighted = [(source, found[source.name].score) for source, _ in self._sources]
        total = sum(source.weight * score for source, score in weighted)
        if not abs(total) <= FLOAT32_MAX:
            terms = " + ".join(f"{source.weight:g} * {score:g} ({source.name})" for source, score in weighted)
            return Void(
                rollout.prompt.sample_id,
                f"the total of the weighted scores must fit float32: {terms} = {total:g}",
                response=answer.response,
            )
        meters.count("ratchet_scored_rollouts_total")
        components = {name: raw.score for name, raw in found.items()}
        origins = {name: raw.origin for name, raw in found.items()}
        figures = {f"{name}/{key}": value for name, raw in found.items() for key, value in raw.figures.items()}
        return Score(total, components, origins, figures, judge_voids)

    def _answer(self, rollout: Rollout) -> RewardInput:
        response_ids, decode = rollout.response_ids.tolist(), partial(self._tokenizer.decode, skip_special_tokens=True)
        return RewardInput(
            prompt=rollout.prompt.text,
            messages=rollout.prompt.messages,
            response=decode(response_ids),
            response_tokens=len(rollout.rollout_logprobs),
            finish_reason=rollout.finish_reason,
            fields=rollout.prompt.fields,
            raw_response=self._tokenizer.decode(response_ids),
            prompt_ids=rollout.prompt.token_ids.tolist(),
            response_ids=response_ids,
            turns=turns_for_reward(rollout.turns, rollout.response_ids, decode),
        )
