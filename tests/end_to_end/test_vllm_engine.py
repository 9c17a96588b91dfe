"""Real vLLM: log-probabilities, weight updates, seeds and stop reasons against Hugging Face models.

vLLM changes global state of torch, so each scenario runs in a process of its own, forked from one that has imported
vLLM.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing import forkserver, get_context
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from common.config.actors import GeneratorsConfig, SamplingConfig
from common.errors import CorruptWeightsError, UserError
from common.model.files import save_policy
from common.model.saved_weights import as_saved
from common.types import Rollout, RolloutRef, SampleId
from common.weights import Bucket, Delta, buckets, make_delta
from tests.fakes import END, ENGINE_GPUS, make_prompt, save_tiny_kind, save_tiny_model
from tests.version_models import VERSIONS, head_moved, save_model_that_writes_its_version

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("forked_from_vllm")]

PROMPTS = [make_prompt(i, (3, *range(4, 5 + i % 7))) for i in range(12)]


def save_model_with_biases(directory):
    """A random two-layer Qwen2: q, k and v have biases, and vLLM pads its vocabulary of 70 to 128."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=70,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        initializer_range=0.05,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


MODELS = {
    "tied": lambda directory: save_tiny_model(directory, tied=True),
    "untied": lambda directory: save_tiny_model(directory, tied=False),
    "biases": save_model_with_biases,
    "mixtral": lambda directory: save_tiny_kind(directory, "mixtral"),
    "glm4_moe": lambda directory: save_tiny_kind(directory, "glm4_moe"),
}


def perturbed(model_dir, version: int, keep=slice(None)) -> list[Bucket]:
    """Every tensor moves so far that no tolerance hides a missed one. The buckets are so small that q, k and v, which
    vLLM merges, are in different ones."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    torch.manual_seed(version)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    saved = as_saved(model, ((name, parameter.detach) for name, parameter in model.named_parameters()))
    return list(buckets(list(saved)[keep], version, bucket_bytes=10_000))


def in_engine(model_dir, dtype, weight_sets=(), *, scenario="rollouts", way="packed", **sampling):
    """Runs `scenario` in a fresh process with a Generator over vLLM, whose weights are updated in the given way."""
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as process:
        return process.submit(_in_engine, model_dir, dtype, list(weight_sets), sampling, scenario, way).result(300)


def _in_engine(model_dir, dtype, weight_sets, sampling, scenario, way):
    from actors.generation import vllm_engine, vllm_settings, vllm_weights
    from actors.generation.generator import Generator

    def not_stageable(self, *args):
        raise vllm_weights.NotStageableError("told so")

    if way == "plain":  # layers without packed copies
        vllm_weights.ops._supports_onednn = False
    elif way == "sharded" and scenario != "rollouts":
        # The engine's two processes come from where this one does, instead of importing vLLM again, which takes longer
        # than all the rest. In the one scenario left they are spawned, as in a run.
        from vllm.v1.executor import multiproc_executor

        forkserver._forkserver.ensure_running = lambda: None
        multiproc_executor.get_mp_context = partial(get_context, "forkserver")
    elif way == "copied":  # as on a GPU; on CPU for layers without packed copies only
        vllm_weights.ops._supports_onednn = False
        vllm_weights.PackedWeights = vllm_weights.CopiedWeights
    elif way == "asynchronous":  # as on a GPU: between two steps one more is in flight
        schedule_asynchronously(vllm_settings.current_platform)
    elif way == "reloaded":
        vllm_weights.PackedWeights.__init__ = not_stageable

    parts = 2 if way == "sharded" else 1
    gpus = parts if ENGINE_GPUS and parts > 1 else ENGINE_GPUS

    def make_engine():
        return vllm_engine.VLLMEngine(
            model_dir,
            GeneratorsConfig(dtype=dtype, kv_cache_mib=16, gpus=gpus, tensor_parallel=parts),
            SamplingConfig.model_validate({"max_new_tokens": 12, **sampling}),
            max_model_len=json.loads((model_dir / "config.json").read_text())["max_position_embeddings"],
            end_token_ids=[END],
        )

    torch.set_num_threads(1)
    (model_dir.parent / "common.py").write_text("raise ImportError('a module named like one of our packages')")
    sys.path.insert(0, str(model_dir.parent))
    generator = Generator("Generator(0)", 7, make_engine, updates="changes")
    # Otherwise another way would be tested.
    expected = {
        "reloaded": "ReloadedWeights",
        "experts": "ReloadedWeights",
        "sharded": "ShardedWeights",
        "copied": "CopiedWeights",
    }.get(way, "CopiedWeights" if ENGINE_GPUS else "PackedWeights")
    assert type(generator._engine._weights).__name__ == expected
    assert len(multiprocessing.active_children()) == (2 if way == "sharded" else 0)
    return asyncio.run(globals()[scenario](generator, weight_sets))


def schedule_asynchronously(platform):
    """vLLM turns asynchronous scheduling off on the CPU, but its executor can do it."""
    kept = type(platform).check_and_update_config

    def check_and_update_config(cls, vllm_config):
        kept(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    type(platform).check_and_update_config = classmethod(check_and_update_config)


async def load(generator, weights: list[Bucket | Delta]) -> int:
    for part in weights:
        await generator.stage(part)
    version, pause_s = await generator.swap(weights[0].version)
    assert pause_s > 0
    return version


async def write(generator, prompt) -> Rollout:
    rollout, written = await generator.generate(prompt)
    assert written == RolloutRef.of(rollout)
    return rollout


async def rollouts(generator, weight_sets) -> list[list[Rollout]]:
    """All prompts at once, before the first update and after each."""
    assert await generator.ready() == "Generator(0)"
    results = [list(await asyncio.gather(*(write(generator, prompt) for prompt in PROMPTS)))]
    for weights in weight_sets:
        assert await load(generator, weights) == weights[0].version
        results.append(list(await asyncio.gather(*(write(generator, prompt) for prompt in PROMPTS))))
    return results


async def updates_in_flight(generator, weight_sets) -> list[Rollout]:
    """Every prompt is requested again and again during all the updates."""
    finished: list[Rollout] = []
    updating = True

    async def keep_asking(prompt) -> None:
        while updating:
            finished.append(await write(generator, prompt))

    asking = [asyncio.create_task(keep_asking(prompt)) for prompt in PROMPTS]
    for weights in weight_sets:
        assert await load(generator, weights) == weights[0].version
    updating = False
    await asyncio.gather(*asking)
    return finished


async def same_prompt_again(generator, weight_sets) -> list[Rollout]:
    """A prompt longer than two blocks of the cache, answered before and after each update."""
    prompt = make_prompt(0, tuple(4 + i % 50 for i in range(300)))
    answers = [await write(generator, prompt), await write(generator, prompt)]
    for weights in weight_sets:
        await load(generator, weights)
        answers.append(await write(generator, prompt))
    return answers


async def one_by_one(generator, weight_sets) -> list[Rollout]:
    return [await write(generator, prompt) for prompt in reversed(PROMPTS)][::-1]


async def update_in_flight(generator, weight_sets) -> tuple[str, list[Rollout]]:
    """A set that breaks off and a corrupt one have no effect. After a good one, tokens have its version."""
    broken_off, weights = weight_sets
    for bucket in broken_off[:-1]:
        await generator.stage(bucket)
    refused = await refusal(load(generator, [*weights[:-1], replace(weights[-1], checksum=0)]))
    for bucket in weights[:-1]:
        await generator.stage(bucket)
    running = [asyncio.create_task(write(generator, prompt)) for prompt in PROMPTS]
    while not await generator._engine._call(partial(tokens_written, generator._engine)):
        await asyncio.sleep(0)
    await load(generator, weights[-1:])
    return refused, list(await asyncio.gather(*running))


async def sleep_in_flight(generator, weight_sets) -> tuple[bool, list[Rollout]]:
    """The engine sleeps in the middle of all responses, and one more is requested. Says whether anything was sampled in
    its sleep."""
    engine = generator._engine
    running = [asyncio.create_task(write(generator, prompt)) for prompt in PROMPTS]
    while not await engine._call(partial(tokens_written, engine)):
        await asyncio.sleep(0)
    await generator.sleep()
    before = await engine._call(partial(tokens_written, engine))
    running.append(asyncio.create_task(write(generator, PROMPTS[0])))
    await generator.sleep()  # a second time has no effect
    sampled = await engine._call(partial(tokens_written, engine)) != before
    await generator.wake()
    return sampled, list(await asyncio.gather(*running))


def tokens_written(engine) -> int:
    """Number of tokens in unfinished responses. Runs on the engine's thread."""
    states = engine._engine.output_processor.request_states.values()
    return sum(state.detokenizer.num_output_tokens() for state in states)


async def refusal(action) -> str:
    try:
        await action
    except CorruptWeightsError as error:
        return str(error)
    return "not refused"


async def refused_updates(generator, weight_sets) -> tuple[list[str], list[Rollout], list[Rollout]]:
    """All sets but the last must be refused, while the old weights serve."""
    *bad, good = weight_sets
    running = [asyncio.create_task(write(generator, prompt)) for prompt in PROMPTS]
    refused = [await refusal(load(generator, weights)) for weights in bad]
    before = [*await asyncio.gather(*running), *await asyncio.gather(*(write(generator, prompt) for prompt in PROMPTS))]
    await load(generator, good)
    return refused, before, list(await asyncio.gather(*(write(generator, prompt) for prompt in PROMPTS)))


async def step_sizes(generator, weight_sets) -> list[int]:
    """All prompts at once to an idle engine: the number of requests in each of its steps."""
    from actors.generation import vllm_engine

    engine, sizes = generator._engine, list[int]()
    step = engine._engine.step

    def counted_step():
        sizes.append(len(engine._waiting))
        return step()

    vllm_engine.GATHER_S, engine._engine.step = 1.0, counted_step
    await asyncio.gather(*(write(generator, prompt) for prompt in PROMPTS))
    return sizes


async def give_up(generator, weight_sets) -> list[Rollout]:
    """Callers are cancelled at any moment; then the same prompt is requested twice at once."""
    for delay in (0.0, 0.001, 0.004, 0.01, 0.02):
        leaving = [asyncio.create_task(write(generator, prompt)) for prompt in PROMPTS]
        await asyncio.sleep(delay)
        for task in leaving:
            task.cancel()
    return list(await asyncio.gather(write(generator, PROMPTS[0]), write(generator, PROMPTS[0])))


async def device_dies(generator, weight_sets) -> list[str]:
    """One of the engine's processes is killed while it is idle."""
    [weights] = weight_sets
    for bucket in weights:
        await generator.stage(bucket)
    multiprocessing.active_children()[0].kill()
    return await dead_engine(generator)


async def reload_fails(generator, weight_sets) -> list[str]:
    """Because of a tensor that the inventory has, and the engine has not."""
    [weights] = weight_sets
    generator._engine._weights._inventory.shapes["surprise.weight"] = (2,)
    for bucket in weights:
        await generator.stage(bucket)
    return await dead_engine(generator)


async def dead_engine(generator) -> list[str]:
    """Outcomes of an update, of the requests before and after it, and of a later one. All its processes must end."""
    calls = [write(generator, PROMPTS[0]), generator.swap(1), write(generator, PROMPTS[1])]
    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        late = await asyncio.gather(write(generator, PROMPTS[2]), return_exceptions=True)
        while multiprocessing.active_children():
            await asyncio.sleep(0.1)
    return [f"{type(outcome).__name__}: {outcome}" for outcome in [*outcomes, *late]]


def hf_logprobs(model_dir, rollout: Rollout, weights: list[Bucket] | None, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities by a fresh Hugging Face model with the given weights: one unpadded row in float32."""
    if weights is not None:
        tensors = dict(pair for bucket in weights for pair in bucket.tensors())
        base, model_dir = model_dir, model_dir.with_name(f"version {weights[0].version}")
        if not model_dir.exists():
            save_policy(tensors, base, model_dir)
    model, loading = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    ids = np.concatenate([rollout.prompt.token_ids, rollout.response_ids]).astype(np.int64)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0].float() / temperature
    first = len(rollout.prompt.token_ids)
    return np.array([logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(first, len(ids))])


@pytest.mark.parametrize(
    ("model", "dtype", "way", "atol"),
    [
        ("tied", "float32", "packed", 1e-4),
        ("tied", "bfloat16", "packed", 0.06),
        ("untied", "float32", "packed", 1e-4),
        ("biases", "float32", "packed", 1e-4),
        ("biases", "float32", "plain", 1e-4),
        ("biases", "float32", "copied", 1e-4),
        ("tied", "float32", "reloaded", 1e-4),
        ("glm4_moe", "float32", "experts", 1e-4),
        ("mixtral", "float32", "sharded", 1e-4),  # tied
    ],
)
def test_after_an_update_logprobs_are_those_of_a_fresh_model(tmp_path, model, dtype, way, atol):
    model_dir = MODELS[model](tmp_path / "model")
    sets = [perturbed(model_dir, 1), perturbed(model_dir, 2)]
    assert len(sets[0]) > 5
    before, *after = in_engine(model_dir, dtype, sets, way=way, temperature=0.8)
    for weights, batch in zip([None, *sets], [before, *after], strict=True):
        version = weights[0].version if weights else 0
        for rollout in batch:
            assert set(rollout.policy_versions) == {version}
            expected = hf_logprobs(model_dir, rollout, weights, temperature=0.8)
            np.testing.assert_allclose(rollout.rollout_logprobs, expected, atol=atol)
    # The check can fail: under the old weights the same tokens are far less likely.
    stale = [hf_logprobs(model_dir, rollout, None, 0.8) - rollout.rollout_logprobs for rollout in after[0]]
    assert np.abs(np.concatenate(stale)).mean() > 5 * atol


@pytest.mark.parametrize("way", ["packed", "sharded"])
def test_a_sample_id_gives_the_same_rollout_alone_and_in_a_batch(tmp_path, way):
    model_dir = save_tiny_model(tmp_path / "model")
    [together] = in_engine(model_dir, "float32")
    alone = in_engine(model_dir, "float32", scenario="one_by_one", way=way)
    for one, other in zip(together, alone, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.rollout_logprobs, other.rollout_logprobs, atol=1e-5)
    assert len({tuple(rollout.response_ids) for rollout in together}) > 6  # different ids, different responses
    for rollout in together:
        ended = rollout.response_ids[-1] == END
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or len(rollout.response_ids) == 12


def test_requests_that_come_together_share_the_first_step(tmp_path):
    sizes = in_engine(save_tiny_model(tmp_path / "model"), "float32", scenario="step_sizes")
    assert sizes[0] == len(PROMPTS)


def test_tokens_after_an_update_have_the_new_version(tmp_path):
    model_dir = save_tiny_model(tmp_path / "model")
    refused, batch = in_engine(
        model_dir,
        "float32",
        [perturbed(model_dir, 4), perturbed(model_dir, 5)],
        scenario="update_in_flight",
        max_new_tokens=100,
    )
    assert "checksum" in refused
    mixed = [rollout for rollout in batch if set(rollout.policy_versions) == {0, 5}]
    assert mixed, "the update came before the first token or after the last"
    for rollout in mixed:
        assert rollout.policy_versions.tolist() == sorted(rollout.policy_versions)
        old = rollout.policy_versions == 0
        difference = np.abs(rollout.rollout_logprobs - hf_logprobs(model_dir, rollout, None))
        assert difference[old].max() < 1e-4  # sampled by the old weights, as their version says
        assert difference[~old].mean() > 0.1  # the others were not


@pytest.mark.parametrize(
    ("way", "sent"),
    [
        ("packed", "changes"),
        ("copied", "full"),
        ("reloaded", "full"),
        ("sharded", "changes"),
        ("asynchronous", "full"),
    ],
)
def test_every_token_is_written_by_the_version_that_it_names(tmp_path, way, sent):
    model_dir = save_model_that_writes_its_version(tmp_path / "model")
    tensors = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).state_dict()
    sets = [head_moved(tensors, version) for version in VERSIONS]
    if sent == "changes":
        sets[1:] = [[make_delta(*pair) for pair in zip(old, new, strict=True)] for old, new in pairwise(sets)]
    batch = in_engine(model_dir, "float32", sets, way=way, scenario="updates_in_flight", max_new_tokens=100)
    for rollout in batch:
        assert (rollout.response_ids - 4).tolist() == rollout.policy_versions.tolist()
        assert np.isfinite(rollout.rollout_logprobs).all()
    assert max(len(set(rollout.policy_versions)) for rollout in batch) >= 3


@pytest.mark.parametrize("way", ["packed", "asynchronous"])
def test_an_engine_that_slept_continues_every_response(tmp_path, way):
    """On the CPU no memory is freed. But as on a GPU the cache is dropped, and its contents are computed again."""
    model_dir = save_tiny_model(tmp_path / "model")
    sampled, batch = in_engine(model_dir, "float32", way=way, scenario="sleep_in_flight", max_new_tokens=100)
    assert not sampled
    assert batch[-1].response_ids.tolist() == batch[0].response_ids.tolist()
    for rollout in batch:
        assert rollout.finish_reason in ("stop", "length")
        np.testing.assert_allclose(rollout.rollout_logprobs, hf_logprobs(model_dir, rollout, None), atol=1e-4)


def test_no_cached_state_of_old_weights_is_used_after_an_update(tmp_path):
    model_dir = save_tiny_model(tmp_path / "model", context=512)
    sets = [perturbed(model_dir, 1), perturbed(model_dir, 2)]
    answers = in_engine(model_dir, "float32", sets, scenario="same_prompt_again")
    for weights, rollout in zip([None, None, *sets], answers, strict=True):
        assert set(rollout.policy_versions) == {weights[0].version if weights else 0}
        np.testing.assert_allclose(rollout.rollout_logprobs, hf_logprobs(model_dir, rollout, weights), atol=1e-4)


def test_cancelled_callers_and_repeated_prompts_change_no_answer(tmp_path):
    one, other = in_engine(save_tiny_model(tmp_path / "model"), "float32", scenario="give_up")
    assert one.response_ids.tolist() == other.response_ids.tolist()


@pytest.mark.parametrize("way", ["packed", "reloaded", "sharded"])
def test_sets_that_do_not_fit_the_model_are_refused(tmp_path, way):
    model_dir = MODELS["biases"](tmp_path / "model")
    lacking = perturbed(model_dir, 1, keep=slice(None, None, 2))  # half of q, k and v: no merged layer is complete
    foreign = list(buckets([("model.layers.0.self_attn.z_proj.weight", torch.ones(2))], 2))
    misshapen = list(buckets([("model.layers.0.self_attn.q_proj.bias", torch.ones(63))], 3))
    # vLLM could slice its shard out of this.
    too_large = list(buckets([("model.layers.0.self_attn.o_proj.weight", torch.ones(64, 128))], 4))
    good = perturbed(model_dir, 5)
    bad = [lacking, foreign, misshapen, too_large]
    refused, before, after = in_engine(model_dir, "float32", [*bad, good], scenario="refused_updates", way=way)
    assert "weights version 1 leaves out" in refused[0]
    assert "model.layers.0.self_attn.k_proj.weight" in refused[0]
    assert "z_proj.weight has the shape (2,), but the engine has no such weight" in refused[1]
    assert "q_proj.bias has the shape (63,), but the engine has" in refused[2]
    assert "o_proj.weight has the shape (64, 128), but the engine has" in refused[3]
    for version, weights, batch in ((0, None, before), (5, good, after)):
        for rollout in batch:
            assert set(rollout.policy_versions) == {version}
            np.testing.assert_allclose(rollout.rollout_logprobs, hf_logprobs(model_dir, rollout, weights), atol=1e-4)


@pytest.mark.parametrize(
    ("scenario", "way", "says"),
    [
        ("reload_fails", "reloaded", "loading weights version 1 failed half way"),
        ("reload_fails", "sharded", "loading weights version 1 failed half way"),
        ("device_dies", "sharded", "one of its processes is gone"),
    ],
)
def test_an_engine_that_fails_half_way_fails_all_its_callers(tmp_path, scenario, way, says):
    model_dir = save_tiny_model(tmp_path / "model")
    weights = dict(pair for bucket in perturbed(model_dir, 1) for pair in bucket.tensors())
    if scenario == "reload_fails":
        weights["surprise.weight"] = torch.ones(2)
    outcomes = in_engine(model_dir, "float32", [list(buckets(weights.items(), 1))], way=way, scenario=scenario)
    assert [outcome.partition(":")[0] for outcome in outcomes] == ["EngineDeadError"] * 4
    assert all(says in outcome for outcome in outcomes[:3])


def test_sampling_seeds_differ_by_run_and_sample():
    from actors.generation.generator import sampling_seed

    ids = [SampleId(e, p, r) for e in range(3) for p in range(20) for r in range(3)]
    seeds = {sampling_seed(run, i) for run in range(3) for i in ids}
    assert len(seeds) == 3 * len(ids)
    assert all(0 <= seed < 2**63 for seed in seeds)


def _said_of_kinds():
    """The refusals of four models on a GPU: a dense one, which has none, and three that are refused."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    from actors.generation.vllm_weights import _check_reload, _unchecked_kind

    def said(quantization=None, layer=torch.nn.Linear):
        module = torch.nn.Module()
        module.layer = layer.__new__(layer)
        torch.nn.Module.__init__(module.layer)
        runner = SimpleNamespace(model_config=SimpleNamespace(quantization=quantization), get_model=lambda: module)
        try:
            _check_reload(_unchecked_kind(runner))
        except UserError as error:
            return str(error)
        return ""

    hybrid = type("Hybrid", (torch.nn.Module, MambaBase), {})
    hybrid.__abstractmethods__ = frozenset()
    return [said(), said(quantization="fp8"), said(layer=RoutedExperts), said(layer=hybrid)]


def test_models_whose_reload_was_not_checked_on_gpus_are_refused_there():
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as process:
        dense, *others = process.submit(_said_of_kinds).result(120)
    assert dense == ""
    for kind, said in zip(("quantized", "mixture-of-experts", "hybrid"), others, strict=True):
        assert said.startswith(f"model.path is a {kind} model")
