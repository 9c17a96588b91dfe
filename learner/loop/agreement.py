"""Checks that the engines compute the same policy as the learner. Runs in the driver.

It compares log-probabilities of sampled tokens: those of a few short answers before training, then those of each batch.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

import numpy as np

from common.config.ppo import Config
from common.errors import RolloutLostError, UserError
from common.types import Prompt, Rollout
from learner.loop.roles import Generators, LearnerGroup

NUM_PROMPTS, NUM_TOKENS = 4, 32  # prompts that are asked before training, and tokens of each answer
# Largest mean difference that rounding explains, nats per token. EXACT: both sides in float32, so only the
# published weights are rounded, to bfloat16 (measured: at most 0.005). ROUNDED: one side computes in bfloat16
# (measured: 0.05 with SmolLM2-135M, 0.01 with tiny mixtures of experts). A temperature below 1 magnifies both.
EXACT, ROUNDED = 0.05, 0.2


async def check_engines(
    cfg: Config, model_type: str, prompts: Sequence[Prompt], generators: Generators, learner: LearnerGroup
) -> None:
    """Compares the log-probabilities of a few answers: those of the engines, which hold the learner's weights, with
    those of the learner. Raises UserError if they differ by more than rounding explains. `model_type` is for the
    message."""
    rollouts: list[Rollout] = []
    while not rollouts:  # if every answer was lost with a dead node, nothing is measured yet
        refs = await asyncio.gather(*(generators.generate(prompt, plain_tokens=NUM_TOKENS) for prompt in prompts))
        fetched = await generators.fetch([ref.rollout for ref in refs])
        rollouts = [rollout for rollout in fetched if not isinstance(rollout, RolloutLostError)]
    found = await learner.policy_logprobs(rollouts)
    difference = mean_difference(found, [rollout.rollout_logprobs for rollout in rollouts])
    exact = (cfg.generators.dtype, cfg.learner.precision) == ("float32", "fp32")
    bound = (EXACT if exact else ROUNDED) / min(1.0, cfg.sampling.temperature)
    if not difference <= bound:  # true for NaN too
        tokens = sum(map(len, found))
        raise UserError(
            f"model.path ({cfg.model.path}), a {model_type} model: vLLM's log-probabilities of {tokens} sampled "
            f"tokens differ from the learner's by {difference:.3g} nats each (mean), but rounding explains at most "
            f"{bound:g}. Both had the same weights, so vLLM computes this kind of model differently, or "
            "misreads its published weights; training would learn from wrong numbers. Use a model that docs/models.md "
            'lists as tested, or rule out rounding with generators.dtype = "float32" and learner.precision = "fp32"'
        )


def mean_difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Mean absolute difference of two sets of log-probabilities, nats; 0 without any, NaN if one is not finite."""
    if sum(map(len, found)) == 0:
        return 0.0
    difference = np.abs(np.concatenate(found).astype(np.float64) - np.concatenate(expected))
    return float(difference.mean()) if np.isfinite(difference).all() else math.nan


class MismatchBound:
    """Ends a run whose `mismatch/kl` is above `ppo.max_mismatch_kl` for `ppo.max_mismatch_steps` steps in a row."""

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._steps = 0  # in a row

    def check(self, stats: Mapping[str, float]) -> None:
        """Called after every step. Raises UserError."""
        if "mismatch/kl" not in stats:  # the step was skipped
            return
        bound, limit, found = self._cfg.ppo.max_mismatch_kl, self._cfg.ppo.max_mismatch_steps, stats["mismatch/kl"]
        self._steps = self._steps + 1 if bound and not found <= bound else 0
        if self._steps >= limit:
            raise UserError(
                f"mismatch/kl ({found:.3g} nats per token) was above ppo.max_mismatch_kl ({bound:g}) in "
                f"{self._steps} steps in a row: generators sample from a distribution other than the learner's. "
                f"{'; '.join(_causes(self._cfg))}. With --resume only settings of generators and the bound itself may "
                "change (ppo.max_mismatch_kl = 0 turns it off); the others need a new run"
            )


def _causes(cfg: Config) -> list[str]:
    """Possible causes of a mismatch under these settings, the likeliest first, each with its remedy."""
    sampling, causes = cfg.sampling, []
    cut = [
        name for name, off in (("top_p", 1.0), ("top_k", 0), ("min_new_tokens", 0)) if getattr(sampling, name) != off
    ]
    if cut:
        named = ", ".join(f"sampling.{name} = {getattr(sampling, name)}" for name in cut)
        causes.append(f"{named} excludes tokens, which the learner does not take into account: turn it off")
    if cfg.max_staleness:
        causes.append(f"max_staleness = {cfg.max_staleness} lets weights differ: lower it, or the learning rate")
    if sampling.temperature < 0.5:
        causes.append(f"sampling.temperature = {sampling.temperature:g} magnifies rounding: raise it")
    if (cfg.generators.dtype, cfg.learner.precision) != ("float32", "fp32"):
        causes.append('bfloat16 rounds: set generators.dtype = "float32" and learner.precision = "fp32"')
    causes.append("vLLM may compute this kind of model differently: use one that docs/models.md lists as tested")
    return causes
