"""Two ranks against one: every gradient, metric, published bucket and saved policy of PPO is the same.

All cases run in one pair of processes, since starting them costs more than the cases do.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from common.experience_table import experience_table
from common.model import compiled_layers
from common.model.size import model_size
from common.weights import Bucket, Manifest, buckets
from learner.ppo.experience import ExperienceBatch
from learner.ppo.learner import Learner
from learner.ranks.distributed import whole
from learner.ranks.rows import sequence_costs, shares
from learner.variance.account import account
from tests.fakes import make_experience, make_prompt, save_tiny_kind, save_tiny_model, tiny_config
from tests.learner.ppo.test_episodes import EPISODES, episodes
from tests.learner.ppo.test_learner import MASK, OTHERWISE, UNUSUAL, WITHOUT_CRITIC, grouped, varied_batch
from tests.learner.ranks.test_distributed import run_ranks
from tests.saving import save_checkpoint_of
from tests.tracing import DISABLED, graphs

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# One exchange takes milliseconds. A rank that waits this long waits for an exchange that the other does not join.
TIMEOUT_S = 20
BUCKET_BYTES = 20_000  # so that the tiny model fills several
NO_CLIPPING = {"optimizer": {"max_grad_norm": 1e9}}  # which would hide a wrong scale


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Sections of later trees change those of earlier ones."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            result[key] = {**result.get(key, {}), **value} if isinstance(value, dict) else value
    return result


def ppo(minibatches: int, epochs: int = 2, **fields: Any) -> dict[str, Any]:
    return {"ppo": {"minibatches": minibatches, "ppo_epochs": epochs, **fields}}


def learner_of(**fields: Any) -> dict[str, Any]:
    return {"learner": fields}


def one_batch() -> list[pa.Table]:
    return [varied_batch(0)]


def two_batches() -> list[pa.Table]:
    return [varied_batch(0), varied_batch(1)]


def grouped_batches() -> list[pa.Table]:
    return [grouped(table) for table in two_batches()]


def episode_batches() -> list[pa.Table]:
    return [episodes(0), episodes(1)]


def context_batches() -> list[pa.Table]:
    return [episodes(seed, contexts=True) for seed in range(2)]


def only_the_first(batches: Callable[[], list[pa.Table]]) -> list[pa.Table]:
    """For cases of many optimizer steps in each update, which take longest."""
    return batches()[:1]


def shuffled_batches(seed: int) -> list[pa.Table]:
    return [table.take(np.random.default_rng(seed).permutation(len(table))) for table in one_batch()]


def lopsided_batches() -> list[pa.Table]:
    """One rollout costs more than all others together, so it is the only one of its rank."""
    rng = np.random.default_rng(3)
    rows = [make_experience(i, rng.integers(2, 60, n).tolist(), score=rng.normal()) for i, n in enumerate([3, 2] * 3)]
    long = make_experience(6, rng.integers(2, 60, 7).tolist(), score=1.0)
    prompt = make_prompt(6, tuple(rng.integers(2, 60, 110).tolist()))
    rows.append(replace(long, rollout=replace(long.rollout, prompt=prompt)))
    rows.append(make_experience(7, [9], score=2.0))
    return [experience_table(rows)]


def without_ref_logprobs() -> list[pa.Table]:
    """A first batch without ref_logprobs, as in step 0 of a run."""
    rows = [make_experience(i, [4 + i, *range(i % 4), 1], score=float(i % 3)) for i in range(8)]
    return [experience_table([replace(row, ref_logprobs=None) for row in rows]), varied_batch(1)]


def only_empty_responses() -> list[pa.Table]:
    rows = [make_experience(i, [], score=float(i)) for i in range(4)]
    return [experience_table(rows + [make_experience(i, [5], score=float(i)) for i in range(4, 8)])]


def one_rollout() -> list[pa.Table]:
    return [varied_batch(0).slice(2, 1), varied_batch(1).slice(3, 1)]


SEPARATE = learner_of(critic="separate")
LORA = learner_of(lora={"rank": 4, "alpha": 8})
COMPILED = learner_of(compile=True, timeout_s=120)  # the ranks may take unequal times to compile
# Each case: settings that differ from UNUSUAL, and the batches.
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "unclipped": ({}, two_batches),
    "clipped": ({"optimizer": {"max_grad_norm": 0.2}}, two_batches),
    "otherwise": (OTHERWISE, one_batch),
    "by-the-token": (learner_of(micro_batch_tokens=1), one_batch),
    "9-tokens": (merged(ppo(8), learner_of(micro_batch_tokens=9)), one_batch),
    "30-tokens": (merged(ppo(1), learner_of(micro_batch_tokens=30)), one_batch),
    "everything-at-once": (learner_of(micro_batch_tokens=512), one_batch),
    "first-pass-is-the-old-one": (merged(ppo(1), learner_of(micro_batch_tokens=512)), two_batches),
    "in-order-0": (ppo(1), partial(shuffled_batches, 0)),
    "in-order-1": (ppo(1), partial(shuffled_batches, 1)),
    "in-order-2": (ppo(4), partial(shuffled_batches, 2)),
    "a-rollout-each": (ppo(8), two_batches),
    "separate": (merged(SEPARATE, ppo(8)), one_batch),
    "warmup": (merged(learner_of(critic_warmup_steps=1), ppo(2)), two_batches),
    "warmup-separate": (merged(SEPARATE, learner_of(critic_warmup_steps=1), ppo(8)), two_batches),
    "value-epochs": (ppo(2, value_epochs=2), two_batches),
    "value-epochs-of-no-tokens-for-a-rank": (ppo(8, value_epochs=1), only_empty_responses),
    "value-epochs-separate": (merged(SEPARATE, ppo(2, value_epochs=2)), two_batches),
    "frozen": (merged(SEPARATE, learner_of(critic_frozen="attention")), two_batches),
    "one-for-a-rank": (ppo(1), lopsided_batches),
    "none-for-a-rank": (merged(ppo(1, 1), {"rollouts_per_step": 1}), one_rollout),
    "empty-responses": (ppo(4), only_empty_responses),
    "no-ref-logprobs": (ppo(2), without_ref_logprobs),
    "episodes": (EPISODES, episode_batches),
    "episodes-by-the-token": (
        merged(EPISODES, SEPARATE, ppo(8), learner_of(micro_batch_tokens=1)),
        partial(only_the_first, episode_batches),
    ),
    "contexts": (EPISODES, context_batches),
    "contexts-by-the-token": (
        merged(EPISODES, SEPARATE, ppo(8), learner_of(micro_batch_tokens=1)),
        partial(only_the_first, context_batches),
    ),
    "checkpointing": (learner_of(gradient_checkpointing=True), one_batch),
    "checkpointing-separate": (merged(SEPARATE, learner_of(gradient_checkpointing=True)), one_batch),
    "no-entropy": (ppo(2, entropy_coef=0.0), one_batch),
    # Passed by the whole minibatch (0.35 and 0.52), by far not by either rank's part of the sum.
    "target-kl": (ppo(2, epochs=4, target_kl=0.3), two_batches),
    "bf16": (learner_of(precision="bf16"), two_batches),
    "compiled": (COMPILED, one_batch),
    "compiled-lora-checkpointing": (merged(COMPILED, LORA, learner_of(gradient_checkpointing=True)), one_batch),
    "lora": (LORA, two_batches),
    "group": (WITHOUT_CRITIC["group"], grouped_batches),
    "returns": (merged(WITHOUT_CRITIC["returns"], ppo(1), learner_of(micro_batch_tokens=512)), two_batches),
    "mask": (merged(MASK, ppo(4)), one_batch),
    "mask-separate": (merged(MASK, SEPARATE, ppo(2)), one_batch),
    "mask-target-kl": (merged(MASK, WITHOUT_CRITIC["returns"], ppo(4, epochs=1, target_kl=0.35)), two_batches),
    "experts": ({}, two_batches),
    "experts-lora": (LORA, two_batches),
    "lora-separate-checkpointing": (
        merged(LORA, SEPARATE, ppo(8), learner_of(gradient_checkpointing=True, critic_warmup_steps=1)),
        two_batches,
    ),
}
ACCOUNTS = ["unclipped", "lora-separate-checkpointing", "mask"]  # the cases whose variance account is made at the end
EXACT = [name for name in CASES if name != "bf16"]


def new_learner(model: Path, name: str) -> Learner:
    """A learner of the tiny model, or of the one with experts."""
    overrides, _ = CASES[name]
    # torch traces both passes, and runs the operations one by one; with adapters only the forward pass, for speed.
    compiled_layers.BACKEND = "eager" if "lora" in name else "aot_eager"
    os.environ.pop(DISABLED, None)
    model = model.with_name("experts") if name.startswith("experts") else model
    settings = merged(UNUSUAL, NO_CLIPPING, ppo(2, target_kl=0.0), learner_of(timeout_s=TIMEOUT_S), overrides)
    settings["reward"].setdefault("sources", [{"name": "a_words", "function": "tests.tasks:a_words"}])
    return Learner(tiny_config(model, **{"rollouts_per_step": 8, **settings}))


def run_case(learner: Learner, name: str) -> dict[str, Any]:
    """Runs a case. Returns all gradients of every optimizer step by name, in full, the metrics of every update, and the
    credit of the last one."""
    steps: list[dict[str, torch.Tensor]] = []
    hook = learner.optimizer.register_step_pre_hook(
        lambda *_: steps.append(
            {n: whole(p.grad).clone() for n, p in learner.network.named_parameters() if p.grad is not None}
        )
    )
    stats = [learner.update(table) for table in CASES[name][1]()]
    hook.remove()
    credit = learner.credit()
    return {
        "gradients": steps,
        "stats": [{k: v for k, v in s.items() if not k.startswith("time/")} for s in stats],
        "credit": credit and credit.to_pydict(),
        "graphs": graphs(),
        "account": account(learner, grouped(varied_batch(2))) if name in ACCOUNTS else None,
    }


def outputs(learner: Learner, directory: Path) -> dict[str, Any]:
    """A learner's outputs, the largest number of values of gathered tensors alive at once, and the types of those."""
    alive, peaks, dtypes = [0], {}, set()

    def counted(parameter: torch.Tensor, *how: torch.dtype) -> torch.Tensor:
        tensor = whole(parameter, *how).clone()  # one of its own also where nothing is gathered
        dtypes.add(tensor.dtype)
        size = tensor.numel()
        alive[0] += size
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - size))
        peaks[what] = max(peaks[what], alive[0])
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("learner.ppo.policy_trainer.buckets", partial(buckets, bucket_bytes=BUCKET_BYTES))
        patch.setattr("learner.ppo.policy.whole", counted)
        patch.setattr("learner.ppo.lora.whole", counted)
        what, peaks["publish"] = "publish", 0
        published = list(learner.publish())
        assert alive == [0]
        what, peaks["save_policy"] = "save_policy", 0
        learner.save_policy(directory / "policy")
    critic = {name: tensor.clone() for name, tensor in learner.network.critic_tensors()}
    ref_logprobs = []
    if learner.cfg.learner.lora:
        rows = [make_experience(i, [4 + i] * (i % 5)).rollout for i in range(7)]
        ref_logprobs = [*learner.ref_logprobs(*rows), *learner.ref_logprobs(rows[0])]
    return {"published": published, "critic": critic, "ref_logprobs": ref_logprobs, "peaks": peaks, "dtypes": dtypes}


WHOLE_LAYERS = ["experts", "experts-lora"]  # gathered by layers, since a file's tensor may be made of several
OUTPUTS = ["unclipped", "lora", "frozen", *WHOLE_LAYERS]  # the cases whose outputs are looked at


def rank_process(rank: int, ready: Barrier, directory: Path, model: Path) -> None:
    """One rank's process: every case with a group of its own, and the outputs of some from the state that one rank
    saved after it."""
    ready.wait()
    for name in CASES:
        learner = new_learner(model, name)
        learner.join(rank, 2, f"file://{directory}/{name}")
        try:
            result = run_case(learner, name)
            if name in OUTPUTS:
                learner.restore(directory / "one" / name / "checkpoint")
                save_checkpoint_of(learner, directory / "two" / name / "checkpoint")
                result |= outputs(learner, directory / "two" / name)
        except BaseException as error:
            raise RuntimeError(f"rank {rank}, case {name}") from error
        torch.save(result, directory / f"{name}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    save_tiny_kind(directory / "experts", "mixtral")
    return save_tiny_model(directory / "model")


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """A directory, and for every case the results of one rank and of each of two."""
    directory, found = tmp_path_factory.mktemp("ranks"), {}
    for name in CASES:
        learner = new_learner(model, name)
        found[name] = [run_case(learner, name)]
        if name in OUTPUTS:
            save_checkpoint_of(learner, directory / "one" / name / "checkpoint")
            found[name][0] |= outputs(learner, directory / "one" / name)
    run_ranks(rank_process, directory, model)
    for name in CASES:
        found[name] += [torch.load(directory / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
    return directory, found


@pytest.mark.parametrize("name", EXACT)
def test_rank_count_does_not_change_any_gradient(runs, name):
    """Largest difference over the largest gradient of the step, 1e-5: float32 sums in another order."""
    alone, *ranks = runs[1][name]
    assert sum(map(len, alone["gradients"])) > 0
    for rank in ranks:
        assert len(rank["gradients"]) == len(alone["gradients"])
        for step, (found, expected) in enumerate(zip(rank["gradients"], alone["gradients"], strict=True)):
            assert found.keys() == expected.keys()
            largest = max(g.abs().max() for g in expected.values())
            for parameter, gradient in expected.items():
                difference = (found[parameter] - gradient).abs().max()
                assert difference <= 1e-5 * largest, (step, parameter)


@pytest.mark.parametrize("name", EXACT)
def test_rank_count_does_not_change_any_metric(runs, name):
    """To 1e-5, and 5e-6 absolute where a sum of terms near one cancels, as in the mean of whitened advantages and in
    explained variances."""
    alone, *ranks = runs[1][name]
    for rank in ranks:
        for found, expected in zip(rank["stats"], alone["stats"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=5e-6)


@pytest.mark.parametrize("name", EXACT)
def test_rank_count_does_not_change_the_credit_of_a_token(runs, name):
    """Rank 0 returns all of it."""
    alone, first, second = (run["credit"] for run in runs[1][name])
    assert second is None
    assert first.keys() == alone.keys()
    for column, rows in alone.items():
        for found, expected in zip(first[column], rows, strict=True):
            assert found == (expected if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-5)), column


@pytest.mark.parametrize("name", ACCOUNTS)
def test_rank_count_does_not_change_the_variance_account(runs, name):
    """Also of a rank that has no row of a part."""
    alone, first, second = (run["account"] for run in runs[1][name])
    assert second == first
    assert first["gradients"] == alone["gradients"]
    assert alone["gradients"]["kept"] == alone["gradients"]["weights"]
    for estimator, expected in alone["estimators"].items():
        found = first["estimators"][estimator]
        assert found["variance"]["value"] == pytest.approx(expected["variance"]["value"], rel=1e-4), estimator
        for which in ("whitened", "unwhitened"):
            for figure in ("gradient_norm", "standard_error"):
                assert found[which][figure] == pytest.approx(expected[which][figure], rel=1e-4), (estimator, figure)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_give_the_same_bits(runs, name):
    _, first, second = runs[1][name]
    assert first["stats"] == second["stats"]
    for one, other in zip(first["gradients"], second["gradients"], strict=True):
        assert all(torch.equal(gradient, other[parameter]) for parameter, gradient in one.items())


def test_the_cases_are_what_their_names_say(model, runs):
    found = runs[1]
    size = model_size(model)

    def sizes(table: pa.Table) -> list[int]:
        costs = sequence_costs(ExperienceBatch.from_table(table).sequences, size)
        return sorted(map(len, shares(costs, 2)))

    assert sizes(lopsided_batches()[0]) == [1, 7]
    assert sizes(one_rollout()[0]) == [0, 1]
    assert found["clipped"][0]["stats"][0]["ppo/grad_norm"] > 0.4
    assert "policy.model.norm.weight" not in found["warmup"][0]["gradients"][0]
    assert "policy.model.norm.weight" in found["warmup"][0]["gradients"][-1]
    assert "critic_body.norm.weight" in found["warmup-separate"][0]["gradients"][0]
    assert found["unclipped"][0]["stats"][1]["ppo/clip_frac"] > 0.05
    assert found["unclipped"][0]["stats"][1]["value/clip_frac"] > 0.01
    assert 0 < found["unclipped"][0]["stats"][1]["mismatch/capped"] < 1
    assert len(found["a-rollout-each"][0]["gradients"]) == 2 * 2 * 8
    assert all(
        0.1 < stats["ppo/masked"] < 0.9 for name in ("mask", "mask-separate") for stats in found[name][0]["stats"]
    )
    assert [stats["ppo/optimizer_steps"] for stats in found["mask-target-kl"][0]["stats"]] == [4, 3]
    for name, parts in (("value-epochs", {"value_head"}), ("value-epochs-separate", {"value_head", "critic_body"})):
        gradients = found[name][0]["gradients"]
        assert len(gradients) == 2 * (2 + 2) * 2
        assert [{key.partition(".")[0] for key in step} for step in gradients[4:8]] == 4 * [parts]
    for gradients in found["frozen"][0]["gradients"]:
        assert "critic_body.layers.0.mlp.up_proj.weight" in gradients
        assert not [name for name in gradients if name.startswith("critic_body") and "self_attn" in name]
    for name in ("compiled", "compiled-lora-checkpointing"):
        assert all(run["graphs"] > 0 for run in found[name])


def test_the_order_of_the_rollouts_does_not_change_the_gradient(runs):
    """With one minibatch; one and two ranks alike."""
    for run in range(3):
        shuffles = [runs[1][f"in-order-{seed}"][run] for seed in range(2)]
        for one, other in zip(*(shuffle["gradients"] for shuffle in shuffles), strict=True):
            largest = max(g.abs().max() for g in one.values())
            assert all((one[name] - other[name]).abs().max() <= 1e-5 * largest for name in one)


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_process_exports_a_checkpoint_of_two_ranks(runs, model, tmp_path, name):
    alone = new_learner(model, name)
    alone.restore_network(runs[0] / "two" / name / "checkpoint")
    alone.save_policy(tmp_path / "policy")
    found, expected = (load_file(path / "policy/model.safetensors") for path in (tmp_path, runs[0] / "one" / name))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_target_kl_ends_the_step_of_every_rank_at_once(runs):
    for run in runs[1]["target-kl"]:
        done = [stats["ppo/optimizer_steps"] for stats in run["stats"]]
        assert done == [stats["ppo/optimizer_steps"] for stats in runs[1]["target-kl"][0]["stats"]]
        assert len(run["gradients"]) == sum(done)
        assert 1 <= min(done) <= max(done) < 8


def test_two_ranks_in_bf16_stay_near_one_in_float32(runs):
    """As near as one rank in bf16 does: see test_bf16_stays_near_float32."""
    exact = runs[1]["unclipped"][0]
    for run in runs[1]["bf16"]:
        flat = [
            torch.cat([g.flatten() for step in result["gradients"] for g in step.values()]) for result in (run, exact)
        ]
        assert not torch.equal(*flat)
        assert torch.cosine_similarity(*flat, dim=0) > 0.999
        assert all(g.dtype == torch.float32 for g in run["gradients"][0].values())
        for key in ("ppo/policy_loss", "value/loss", "ppo/entropy", "kl/per_token", "ppo/grad_norm"):
            assert run["stats"][0][key] == pytest.approx(exact["stats"][0][key], rel=0.01), key


@pytest.mark.parametrize("name", OUTPUTS)
def test_only_the_first_rank_publishes_and_its_bits_are_those_of_one(runs, name):
    alone, first, second = (run["published"] for run in runs[1][name])
    assert second == [Manifest((), ())]
    assert len(alone) == len(first) > 6
    for found, expected in zip(first, alone, strict=True):
        if isinstance(expected, Bucket):
            found.verify()
            assert found.entries == expected.entries
            assert np.array_equal(found.values, expected.values)
            assert (found.version, found.index, found.last) == (expected.version, expected.index, expected.last)
        else:
            assert found == expected


@pytest.mark.parametrize("name", OUTPUTS)
def test_two_ranks_gather_the_critic_that_one_has_in_float32(runs, name):
    alone, *ranks = (run["critic"] for run in runs[1][name])
    assert ("norm.weight" in alone) == (name == "frozen")  # the others share the policy's trunk
    for rank in ranks:
        assert rank.keys() == alone.keys()
        assert all(torch.equal(rank[key], tensor) for key, tensor in alone.items())
        assert {tensor.dtype for tensor in rank.values()} == {torch.float32}


def test_shards_are_gathered_in_bf16_where_they_are_published(runs):
    alone, *ranks = runs[1]["unclipped"]
    assert alone["dtypes"] == {torch.float32}  # one rank gathers nothing
    assert [run["dtypes"] for run in ranks] == 2 * [{torch.bfloat16}]


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name not in WHOLE_LAYERS])
def test_gathering_weights_holds_at_most_two_whole_tensors(runs, name):
    entries = [entry for item in runs[1][name][0]["published"] if isinstance(item, Bucket) for entry in item.entries]
    sizes = [int(np.prod(entry.shape)) for entry in entries]
    for run in runs[1][name]:
        for what, peak in run["peaks"].items():
            if what == "save_policy" and run["dtypes"] == {torch.bfloat16}:
                continue  # they are what it writes, so it keeps them
            # A tensor may be alive until the next is gathered, together with the two small ones of its adapter.
            assert 0 < peak <= 2 * max(sizes) + 2 * 4 * (64 + 128), what
            assert peak < sum(sizes) / 3


@pytest.mark.parametrize("name", OUTPUTS)
def test_two_ranks_save_the_policy_that_one_does(runs, name):
    directory = runs[0]
    files = ["policy/model.safetensors", *(["adapter/adapter_model.safetensors"] if name.endswith("lora") else [])]
    for file in files:
        one, two = (load_file(directory / ranks / name / file) for ranks in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    for what in ("policy", "adapter")[: len(files)]:
        one, two = (sorted(p.name for p in (directory / ranks / name / what).iterdir()) for ranks in ("one", "two"))
        assert one == two


def test_two_ranks_measure_the_reference_as_one_does(runs):
    alone, *ranks = (run["ref_logprobs"] for run in runs[1]["lora"])
    assert [len(row) for row in alone] == [i % 5 for i in range(7)] + [0]
    for rank in ranks:
        for found, expected in zip(rank, alone, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert found.dtype == np.float32
