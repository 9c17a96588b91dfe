"""Real vLLM: what turns need of an engine. Stop texts and tokens, the bound of one call, and prefixes in the cache."""

from __future__ import annotations

import asyncio
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from actors.generation.engine import Completion
from common.config.actors import GeneratorsConfig, SamplingConfig
from common.metrics import meters
from common.types import HANDED_OVER, Rollout
from common.weights import Bucket, buckets
from tests.end_to_end.test_vllm_engine import hf_logprobs, perturbed, schedule_asynchronously
from tests.fakes import END, ENGINE_GPUS, OWN_TAGS, make_prompt, metered, save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("forked_from_vllm")]

LONGEST, SHORTEST = 40, 3  # sampling.max_new_tokens and min_new_tokens
BLOCK = 32  # tokens of one block of the cache on the CPU; only full blocks are found again
STOPS = ("1 b", "<unk>")  # the first one spans two tokens, such as a21 b7; the second one is a special token


@dataclass(frozen=True)
class Asked:
    """One call of `Engine.generate`."""

    prompt: list[int]
    begun: list[int]
    seed: int
    max_tokens: int | None = None


def asked(k: int, begun: tuple[int, ...] = (), **options) -> Asked:
    return Asked([3, *range(4, 5 + k % 7)], list(begun), seed=k, **options)


# Responses from the beginning, and some that continue "a1 a21", "a1 a21 b7" and "a3 a5 a21". A b would stop the last
# ones at once; the first ones are too short then. Stop texts inside the begun tokens stop nothing.
CALLS = [asked(k, begun) for k in range(12) for begun in ((), (5, 25), (5, 25, 41), (7, 9, 25))]


def in_engine(scenario, model_dir, *given, asynchronous=False, **settings):
    """Runs the scenario with an engine, in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as process:
        return process.submit(_in_engine, scenario, model_dir, given, asynchronous, settings).result(300)


def _in_engine(scenario, model_dir, given, asynchronous, settings):
    from actors.generation import vllm_engine, vllm_settings

    if asynchronous:  # as on a GPU: between two steps one more is in flight
        schedule_asynchronously(vllm_settings.current_platform)
    sampling = {"max_new_tokens": LONGEST, "min_new_tokens": SHORTEST, **settings.pop("sampling", {})}
    cfg = {"dtype": "float32", "kv_cache_mib": 16, "gpus": ENGINE_GPUS, **settings.pop("generators", {})}
    torch.set_num_threads(1)
    engine = vllm_engine.VLLMEngine(
        model_dir,
        GeneratorsConfig.model_validate(cfg),
        SamplingConfig.model_validate(sampling),
        max_model_len=512,
        **{"end_token_ids": [END], **settings},
    )
    return asyncio.run(scenario(engine, *given))


def ask(engine, call: Asked, **options):
    context = np.array(call.prompt + call.begun, dtype=np.int32)
    return engine.generate(context, seed=call.seed, num_begun=len(call.begun), max_tokens=call.max_tokens, **options)


async def answers(engine, calls) -> list[Completion]:
    return list(await asyncio.gather(*(ask(engine, call) for call in calls)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), context=512)


@pytest.fixture(scope="module")
def unstopped(model, forked_from_vllm) -> list[Completion]:
    """The answers to CALLS without stops."""
    return in_engine(answers, model, CALLS)


def first_stop(tokenizer, call: Asked, tokens: list[int]) -> int | None:
    """Number of these tokens after which the response is stopped, found by decoding it again for every token."""
    for number in range(1, len(tokens) + 1):
        before = tokenizer.decode(call.begun + tokens[: number - 1])
        text = tokenizer.decode(call.begun + tokens[:number])
        ends = [at + len(stop) for stop in STOPS for at in range(len(text)) if text.startswith(stop, at)]
        if len(call.begun) + number > SHORTEST and any(end > len(before) for end in ends):
            return number
    return None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_response_ends_at_the_token_that_completes_a_stop_text(model, unstopped, asynchronous):
    """Also if the text begins in tokens that another engine has sampled. The tokens are those without stops."""
    found = in_engine(answers, model, CALLS, asynchronous=asynchronous, sampling={"stop": STOPS})
    tokenizer = AutoTokenizer.from_pretrained(model)
    spanned = early = 0
    for call, free, stopped in zip(CALLS, unstopped, found, strict=True):
        number = first_stop(tokenizer, call, free.token_ids.tolist())
        assert stopped.token_ids.tolist() == free.token_ids[:number].tolist()
        np.testing.assert_allclose(stopped.logprobs, free.logprobs[:number], atol=1e-6)
        assert stopped.finish_reason == ("stop" if number else free.finish_reason)
        assert stopped.policy_versions.tolist() == [0] * len(stopped.token_ids)
        spanned += bool(call.begun) and number == 1 and stopped.token_ids[0] != 2
        text = tokenizer.decode(free.token_ids[:SHORTEST].tolist())
        early += not call.begun and any(stop in text for stop in STOPS)
    assert spanned >= 3, "no stop text spanned what was begun and what was added"
    assert early > 0, "no stop text came before min_new_tokens"
    assert len({len(stopped.token_ids) for stopped in found}) > 8


async def plain_and_handed_over(engine, calls):
    """Tokens of the whole distribution; then responses that are ended at once and continued."""
    plain = await asyncio.gather(*(ask(engine, call, plain_tokens=LONGEST) for call in calls))
    running = [asyncio.create_task(ask(engine, call)) for call in calls]
    await engine._call(lambda: None)
    while not await engine._call(partial(longest_unfinished, engine)) > 3:
        await asyncio.sleep(0)
    await engine.hand_over()
    return list(plain), list(await asyncio.gather(*running))


def longest_unfinished(engine) -> int:
    """Tokens of the longest unfinished response. Runs on the engine's thread."""
    states = engine._engine.output_processor.request_states.values()
    return max((state.detokenizer.num_output_tokens() for state in states), default=0)


def test_with_stops_whole_distributions_and_handed_over_responses_keep_all_tokens(model, unstopped):
    calls = CALLS[::4]  # from the beginning
    plain, partial_ = in_engine(
        plain_and_handed_over, model, calls, sampling={"stop": STOPS, "stop_token_ids": [4], "top_k": 60}
    )
    assert {(len(found.token_ids), found.finish_reason) for found in plain} == {(LONGEST, "length")}
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert any(stop in tokenizer.decode(found.token_ids.tolist()) for found in plain for stop in STOPS)
    assert any(token in found.token_ids for found in plain for token in (4, END))
    assert {found.finish_reason for found in partial_} >= {HANDED_OVER}
    for found in partial_:
        assert len(found.token_ids) == len(found.logprobs) == len(found.policy_versions)


def test_a_stop_token_ends_a_response_as_the_end_token_does(model):
    ends = {END, 4, 7, 20, 40}
    found = in_engine(answers, model, CALLS, sampling={"stop_token_ids": sorted(ends - {END})})
    for call, completion in zip(CALLS, found, strict=True):
        tokens = completion.token_ids.tolist()
        forbidden = max(0, SHORTEST - len(call.begun))
        assert not ends & set(tokens[:-1] if completion.finish_reason == "stop" else tokens)
        assert completion.finish_reason == ("stop" if tokens[-1] in ends else "length")
        assert len(tokens) > forbidden
    assert {completion.token_ids[-1] for completion in found} >= {4, 7, 20, 40}


def test_a_call_adds_at_most_its_bound(model):
    calls = [
        asked(k, begun, max_tokens=most) for k in range(6) for begun in ((), (5,) * 38) for most in (None, 1, 2, 100)
    ]
    found = in_engine(answers, model, calls)
    for start in range(0, len(calls), 4):
        free, *bounded = found[start : start + 4]
        room = LONGEST - len(calls[start].begun)
        for call, completion in zip(calls[start + 1 :], bounded, strict=False):
            number = min(call.max_tokens, len(free.token_ids))
            assert completion.token_ids.tolist() == free.token_ids[:number].tolist()
            reason = free.finish_reason if number == len(free.token_ids) else "length"
            assert completion.finish_reason == reason
        assert len(free.token_ids) <= room
    assert {len(completion.token_ids) for completion in found[4:8]} == {1, 2}  # 38 of 40 tokens were there


OBSERVATION = [60, 61, 62, 63]


async def conversation(engine, weight_sets) -> tuple[list[tuple[list[int], Completion]], list[list[float]]]:
    """Contexts and answers, and the meters of prompt and cached tokens. There are three turns, and the last one is
    asked twice more after each update. The last update comes while it is answered once more, and one request waits.
    Then there is a fourth turn."""
    memory, context, found = metered(), [4 + k % 50 for k in range(300)], []
    for counted in ("prompt", "cached"):
        meters.count(f"ratchet_generator_{counted}_tokens_total", 0)

    async def say(seed: int) -> tuple[list[int], Completion]:
        asked = list(context)
        return asked, await engine.generate(np.array(asked, dtype=np.int32), seed=seed)

    for turn in range(3):
        if turn:
            context += [*found[-1][1].token_ids.tolist(), *OBSERVATION]
        found.append(await say(turn))
    *sets, last = weight_sets
    for weights in sets:
        await stage(engine, weights)
        await engine.swap(weights[0].version)
        found += [await say(len(found)), await say(len(found) + 1)]
    await stage(engine, last)
    running, waiting = (asyncio.create_task(say(seed)) for seed in (7, 8))
    while not await engine._call(partial(longest_unfinished, engine)):
        await asyncio.sleep(0)
    await engine.swap(last[0].version)
    found += [await running, await waiting]
    context += [*found[-2][1].token_ids.tolist(), *OBSERVATION]
    found.append(await say(9))
    return found, [memory.read(f"ratchet_generator_{name}_tokens_total", **OWN_TAGS) for name in ("prompt", "cached")]


async def stage(engine, weights) -> None:
    for bucket in weights:
        await engine.stage(bucket)


def published(model_dir, seed: int, version: int) -> list[Bucket]:
    """The weights `perturbed` with this seed, as this version."""
    return list(buckets((pair for bucket in perturbed(model_dir, seed) for pair in bucket.tensors()), version))


@pytest.fixture(scope="module")
def endless(model):
    """The same model without an end token, so that every response has LONGEST tokens."""
    directory = model.with_name("endless")
    shutil.copytree(model, directory)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((directory / name).read_text())
        del settings["eos_token_id"]
        (directory / name).write_text(json.dumps(settings))
    return directory


def test_turns_find_the_states_of_their_own_weights_only(endless):
    """One version is swapped in twice, with other weights. One request runs at a time."""
    model = endless
    sets = [published(model, seed, version) for seed, version in ((1, 1), (2, 2), (3, 2), (4, 3))]
    settings = {"generators": {"max_running": 1}, "sampling": {"min_new_tokens": 0}, "end_token_ids": []}
    (warm, counted), (cold, nothing) = (
        in_engine(conversation, model, sets, caches_prefixes=caches, **settings) for caches in (True, False)
    )
    weights_of = [None] * 3 + [1, 1, 2, 2, 3, 3] + ["changed", 4, 4]
    for (context, found), (other, free), seed in zip(warm, cold, weights_of, strict=True):
        if seed == "changed":  # of two versions, the second with kept states of the first
            assert sorted(set(found.policy_versions)) == [2, 3]
            continue
        rollout = Rollout(make_prompt(0, tuple(context)), *tokens_of(found), "length", "")
        expected = hf_logprobs(model, rollout, None if seed is None else perturbed(model, seed))
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-4)
        if context == other:  # up to the update at an unknown time
            assert found.token_ids.tolist() == free.token_ids.tolist()
            np.testing.assert_allclose(found.logprobs, free.logprobs, atol=1e-5)
    assert sum(context == other for (context, _), (other, _) in zip(warm, cold, strict=True)) >= 11

    def full_blocks(tokens: int) -> int:
        return tokens // BLOCK * BLOCK

    turns = [full_blocks(len(context) + len(found.token_ids) - 1) for context, found in warm[:2]]
    again = full_blocks(len(warm[2][0]) - 1)  # the last token of a prompt is always computed
    expected_counts = [0, *turns, *[0, again] * 3, again, 0, again]
    assert [found.cached_tokens for _, found in warm] == expected_counts
    assert [len(context) for context, _ in warm] == [300, 344, *[388] * 9, 432]
    assert [*turns, again] == [10 * BLOCK, 11 * BLOCK, 12 * BLOCK]
    assert counted == [[sum(len(context) for context, _ in warm)], [sum(expected_counts)]]
    assert [found.cached_tokens for _, found in cold] == [0] * 12
    assert nothing == [[0], [0]]


def tokens_of(found: Completion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return found.token_ids, found.logprobs, found.policy_versions
