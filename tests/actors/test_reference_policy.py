"""Reference log-probabilities against an unpadded forward pass of the same model, one rollout at a time."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.reference_policy import ReferencePolicy
from common.config import ReferenceConfig
from tests.fakes import END, make_prompt, make_rollout, save_tiny_model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_batch_tokens", [1, 24, 4096])
def test_logprobs_do_not_depend_on_company_and_follow_the_temperature(tmp_path, temperature, max_batch_tokens):
    directory = save_tiny_model(tmp_path)
    cfg = ReferenceConfig(dtype="float32", max_batch_tokens=max_batch_tokens)
    reference = ReferencePolicy("ReferencePolicy(0)", cfg, model=str(directory), temperature=temperature)
    rng = np.random.default_rng(0)
    rollouts = [
        make_rollout(make_prompt(i, tuple(range(3, 5 + i))), [*rng.integers(4, 60, i % 4).tolist(), END])
        for i in range(9)
    ]

    async def ask():
        return await asyncio.gather(*(reference.logprobs(rollout) for rollout in rollouts))

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for rollout, found in zip(rollouts, asyncio.run(ask()), strict=True):
        ids = [*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0] / temperature
        first = len(rollout.prompt.token_ids)
        expected = [logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(first, len(ids))]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
