"""RUN/texts/NAME.json: how likely the windows of the texts are under one policy. Runs in the driver.

    {"digest": "...", "nll": {"shipped": [w1, w2, ...], "own": [...]}}

A reference replica computes the log-probabilities, because it can hold any policy. It gets a window as the response to
the tokens before it. The file has the sum over the tokens of each window, so an evaluation that continues measures each
policy once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.pool.roles import ReferencePool
from common.config.ppo import Config
from common.errors import RolloutLostError, UserError
from common.files import write_durably
from common.types import Rollout, RolloutRef
from deploy.evaluation.texts import Text
from deploy.policy_files import PolicyFiles
from deploy.starting import Starter
from learner.evaluation.bootstrap import Bootstrap
from learner.evaluation.forgetting import perplexity, perplexity_ratio

DIRECTORY = "texts"

Sums = Mapping[str, np.ndarray]  # negative log-probability of each window, float64 nats, by the name of its text


class TextMeasurement:
    """The sums of every policy in the run directory, and which of them are missing."""

    def __init__(self, cfg: Config, run: Path, texts: Sequence[Text]) -> None:
        self._cfg, self._run, self._texts = cfg, run, texts
        parts = [[w.prompt.token_ids.tolist(), w.response_ids.tolist()] for text in texts for w in text.windows]
        known = [cfg.reference.dtype, [text.name for text in texts], parts]
        self._digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def read(self, name: str) -> Sums | None:
        """The sums of a policy. None if it was not measured, or was measured on other windows."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self._path(name).read_text(encoding="utf-8"))
            sums = {text.name: np.array(record["nll"][text.name], dtype=np.float64) for text in self._texts}
            if record["digest"] == self._digest and all(len(sums[t.name]) == len(t.windows) for t in self._texts):
                return sums
        return None

    def missing(self, names: Iterable[str]) -> list[str]:
        """The policies that must be measured."""
        return [name for name in names if self._texts and self.read(name) is None]

    async def measure(self, name: str, policy: PolicyFiles, start: Starter, read: Callable[[int, int], None]) -> None:
        """Measures a policy at temperature 1. Starts reference replicas with `start`; the caller ends them. `read` is
        called with the number of windows read so far, and of all. Raises UserError."""
        pool = await start.references(self._cfg, model=policy.path, temperature=1.0)
        reference, done, total = ReferencePool(pool), 0, sum(len(text.windows) for text in self._texts)

        async def ask(window: Rollout) -> float:
            nonlocal done
            nll = await _nll(window, reference, pool.host.fetch)
            done += 1
            read(done, total)
            return nll

        sums = {text.name: await asyncio.gather(*map(ask, text.windows)) for text in self._texts}
        if not all(np.isfinite(values).all() for values in sums.values()):
            raise UserError(
                f"{policy.path} gives log-probabilities of a text that are not finite, so it has no perplexity; check "
                "its weights, or set evaluation.text_tokens=0"
            )
        self._path(name).parent.mkdir(exist_ok=True)
        write_durably(self._path(name), json.dumps({"digest": self._digest, "nll": sums}) + "\n")

    def figures(self, name: str, base: str | None) -> dict[str, Any]:
        """The figures of a measured policy for evaluation.json, by text; `base`: the policy to divide by."""
        own, other = self.read(name), self.read(base) if base is not None and base != name else None
        found: dict[str, Any] = {"perplexity": {}}
        if own is None:
            return found
        for text in self._texts:
            nll, tokens, bootstrap = own[text.name], text.tokens, Bootstrap(len(text.windows), seed=self._cfg.seed)
            size = {"tokens": int(tokens.sum()), "windows": len(text.windows)}
            found["perplexity"][text.name] = {**perplexity(nll, tokens, bootstrap), **size}
            if other is not None:
                ratio = perplexity_ratio(nll, other[text.name], tokens, bootstrap)
                found.setdefault("perplexity_ratio", {})[text.name] = ratio
        return found

    def _path(self, name: str) -> Path:
        return self._run / DIRECTORY / f"{name}.json"


async def _nll(window: Rollout, reference: ReferencePool, fetch: Callable[[Sequence[Any]], Any]) -> float:
    """The sum over the window's tokens, nats. Asks again if the replica died before the values were fetched."""
    ref = replace(RolloutRef.of(window), rollout=window)
    while True:
        logprobs, _ = await reference.logprobs(ref)
        [values] = await fetch([logprobs])
        if not isinstance(values, RolloutLostError):
            return -float(values.sum(dtype=np.float64))
