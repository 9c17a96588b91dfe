"""The reward service: Python functions that score a response, and how several are combined."""

from __future__ import annotations

import math
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.config import RewardConfig
from common.functions import load_function
from common.models import load_tokenizer, resolve_model
from common.types import RewardInput, Rollout, Score, Void


class Reward:
    """Scores rollouts by every configured source; `total = sum(weight * raw)`."""

    def __init__(self, name: str, cfg: RewardConfig, *, model: str | PreTrainedTokenizerBase) -> None:
        self._name = name
        self._tokenizer = load_tokenizer(Path(resolve_model(model))) if isinstance(model, str) else model
        self._sources = [(source, load_function(source.function, "reward.sources")) for source in cfg.sources]

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
        components = {}
        for source, function in self._sources:
            try:
                raw = float(function(answer))
            except Exception as error:
                return Void(
                    rollout.prompt.sample_id, f"reward source {source.name} raised {type(error).__name__}: {error}"
                )
            if not math.isfinite(raw):
                return Void(rollout.prompt.sample_id, f"reward source {source.name} returned {raw}")
            components[source.name] = raw
        return Score(sum(source.weight * components[source.name] for source, _ in self._sources), components)
