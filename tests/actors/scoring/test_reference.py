"""Reference log-probabilities against an unpadded forward pass of the same model, one rollout at a time."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.scoring.reference import ReferencePolicy
from common.config.actors import ReferenceConfig
from common.experience_table import experience_table
from common.types import Experience, Score
from tests.contexts import contexts_of
from tests.fakes import END, as_episode, make_experience, make_prompt, make_rollout, random_turns, save_tiny_model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_batch_tokens", [1, 24, 4096])
def test_logprobs_are_transformers_own_at_the_temperature(tmp_path, temperature, max_batch_tokens):
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
    for rollout, (found, finite) in zip(rollouts, asyncio.run(ask()), strict=True):
        assert finite
        ids = [*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0] / temperature
        first = len(rollout.prompt.token_ids)
        expected = [logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(first, len(ids))]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("contexts", [False, True])
@pytest.mark.parametrize("max_batch_tokens", [1, 60, 4096])
def test_only_the_policys_tokens_of_an_episode_are_measured(tmp_path, max_batch_tokens, contexts):
    """Each after everything before it in its context, what the environment said included."""
    directory = save_tiny_model(tmp_path)
    cfg = ReferenceConfig(dtype="float32", max_batch_tokens=max_batch_tokens)
    reference = ReferencePolicy("ReferencePolicy(0)", cfg, model=str(directory), temperature=0.7)
    rng = np.random.default_rng(0)
    rollouts = []
    for i in range(9):
        turns = random_turns(rng, i % 4, contexts=contexts)
        length = (turns[-1].next_start if turns else 0) + int(rng.integers(3))
        rollouts.append(as_episode(make_experience(i, rng.integers(4, 60, length).tolist()), *turns).rollout)
    found = asyncio.run(_measured(reference, rollouts))

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    lengths = set()
    for rollout, logprobs in zip(rollouts, found, strict=True):
        [row] = experience_table([Experience(rollout, Score(0.0, {}), None)]).to_pylist()
        expected = []
        for ids, sampled in contexts_of(row):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0] / 0.7
            expected += [logits[t - 1].log_softmax(-1)[ids[t]].item() for t in sampled]
        np.testing.assert_allclose(logprobs, expected, atol=1e-5)
        lengths.add((len(expected), len(contexts_of(row))))
    assert len(lengths) > 3
    assert (max(count for _, count in lengths) > 2) == contexts


async def _measured(reference, rollouts):
    return [row for row, _ in await asyncio.gather(*(reference.logprobs(rollout) for rollout in rollouts))]


def test_other_rows_of_a_batch_do_not_change_a_rollouts_bits(tmp_path):
    """On one thread, as a reference process runs by default."""
    cfg = ReferenceConfig(dtype="float32", threads=1)
    reference = ReferencePolicy("ReferencePolicy(0)", cfg, model=str(save_tiny_model(tmp_path)), temperature=0.7)
    rng = np.random.default_rng(0)
    rollouts = [
        make_rollout(make_prompt(i, tuple(rng.integers(3, 60, rng.integers(1, 40)))), rng.integers(3, 60, n).tolist())
        for i, n in enumerate(rng.integers(0, 20, 28))
    ]
    # These two have a single response token, also after padding: torch multiplies one row with another kernel.
    rollouts += [make_rollout(make_prompt(n, tuple(range(3, 3 + n))), [7]) for n in (15, 31)]
    for i in range(30, 40):
        turns = random_turns(rng, 3, contexts=i % 2 == 0)
        response = rng.integers(3, 60, turns[-1].next_start + 3).tolist()
        rollouts.append(as_episode(make_experience(i, response), *turns).rollout)
    alone = [reference.forward([rollout])[0] for rollout in rollouts]
    assert [len(row) for row in alone] == [int(rollout.response_mask.sum()) for rollout in rollouts]
    for size in (2, 3, 7, 40):
        order = rng.permutation(40)
        for first in range(0, 40, size):
            chosen = order[first : first + size]
            for i, found in zip(chosen, reference.forward([rollouts[i] for i in chosen]), strict=True):
                assert found.tobytes() == alone[i].tobytes(), (size, i)


def test_no_pass_holds_more_than_its_budget_with_padding(tmp_path):
    cfg = ReferenceConfig(dtype="float32", max_batch_tokens=64)
    reference = ReferencePolicy("ReferencePolicy(0)", cfg, model=str(save_tiny_model(tmp_path)), temperature=1.0)
    passes = []
    reference._model.base_model.layers[0].register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    # Prompts have 3 tokens, so rollouts have 16, 17, 16, 33 and 8: padded 16, 32, 16, 48 and 16.
    rollouts = [make_rollout(make_prompt(i), [4] * n) for i, n in enumerate([13, 14, 13, 30, 5])]

    async def ask():
        return await asyncio.gather(*(reference.logprobs(rollout) for rollout in rollouts))

    asyncio.run(ask())
    assert passes == [48, 48, 32]  # 48 | 32 + 16, which counts as two rows of 32 | 16 + 16
