"""Made-up experience for the learner's benchmarks: 48 rollouts of 16 to 128 tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from common.config.ppo import Config
from common.experience_table import experience_table
from common.model.files import resolve_model
from common.model.size import model_size
from common.types import Experience, Prompt, Rollout, SampleId, Score

MODEL = "embedded:smollm2-135m-instruct"
ROLLOUTS, SHORTEST, LONGEST = 48, 16, 128  # tokens, prompt and response, which are halves


def config(model: str, **sections: Any) -> Config:
    """The default settings, but for strictly on-policy steps and what is given."""
    tree = {
        "rollouts_per_step": ROLLOUTS,
        "max_staleness": 0,
        "model": {"path": model},
        "prompts": {"train": "tests.bench.task:prompts"},
        "reward": {"sources": [{"name": "variety", "function": "tests.bench.task:reward"}]},
    }
    return Config.model_validate(tree | sections)


def batch(model: str, *, rollouts: int = ROLLOUTS, shortest: int = SHORTEST, longest: int = LONGEST) -> pa.Table:
    """Random tokens of the model's vocabulary; lengths evenly spread, in random order."""
    rng, vocabulary = np.random.default_rng(0), model_size(resolve_model(model)).vocabulary
    lengths = 2 * np.round(np.linspace(shortest, longest, rollouts) / 2).astype(int)
    rows = []
    for index, length in enumerate(rng.permutation(lengths)):
        ids = rng.integers(4, vocabulary, length).astype(np.int32)
        prompt, response = np.split(ids, [length // 2])
        logprobs = rng.normal(-4, 1, len(response)).astype(np.float32)
        versions = np.zeros(len(response), np.int32)
        asked = Prompt(SampleId(0, index, 0), "", prompt)
        rollout = Rollout(asked, response, logprobs, versions, "length", "none")
        score = float(rng.normal())
        rows.append(Experience(rollout, Score(score, {"variety": score}), logprobs))
    return experience_table(rows)
