"""Made series of step records for the health rules: a steady run, and what a fault or a look-alike changes in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.config.ppo import Config
from tests.fakes import tiny_config

Record = dict[str, Any]
ROLLOUTS = 64


def config(**sections: Any) -> Config:
    """Two reward sources, one of them a penalty, and responses of at most 100 tokens."""
    sources = [
        {"name": "exact", "function": "tests.tasks:a_words"},
        {"name": "long", "function": "tests.tasks:a_words", "weight": -0.5},
    ]
    sections = {"sampling": {"max_new_tokens": 100}, "reward": {"sources": sources}, "max_staleness": 1, **sections}
    return tiny_config("model", rollouts_per_step=ROLLOUTS, num_steps=100, **sections)


def steady(step: int) -> Record:
    """A step of a run that learns slowly and has no fault."""
    wobble = (-1) ** step
    return {
        "step": step,
        "rollout/score/mean": 0.2 + 0.005 * step + 0.01 * wobble,
        "rollout/score/std": 0.45,
        "rollout/score/zero_std": 0.0,
        "reward/exact/score": 0.25 + 0.005 * step + 0.01 * wobble,
        "reward/long/score": 0.1 + 0.01 * wobble,
        "reward/running_std": 0.45,
        "rollout/response_tokens/mean": 40.0 + wobble,
        "rollout/finished": 0.95,
        "rollout/voids": 0,
        "staleness/max": 1,
        "wait/learner_s": 2.0,
        "wait/generators_s": 1.0,
        "time/journal_s": 0.1,
        "time/learn_s": 5.0,
        "time/publish_s": 0.5,
        "kl/per_response": 0.05 * step,
        "kl/coef": 0.05,
        "mismatch/kl": 0.002,
        "mismatch/capped": 0.0,
        "ppo/entropy": 1.5 - 0.005 * step,
        "ppo/clip_frac": 0.1,
        "ppo/approx_kl": 0.008,
        "value/returns_var/realised": 0.2,
        "value/explained_variance/realised": min(0.3, 0.03 * step),
        "value/explained_variance/first": min(0.1, 0.01 * step),
        "value/calibration_error": 0.1,
    }


def series(length: int, **changed: Callable[[int], float] | float) -> list[Record]:
    """A steady run with other values, each a number or a function of the step. In a name, __ stands for /."""
    found = []
    for step in range(length):
        new = {name.replace("__", "/"): value(step) if callable(value) else value for name, value in changed.items()}
        found.append({**steady(step), **new})
    return found
