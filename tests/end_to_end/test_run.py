"""Whole runs, small: Ray, vLLM, reference, reward, learner and weight sync, on a tiny random model."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.pool.ray_actor import actor
from common.config.base import RayConfig
from common.config.ppo import Config
from common.files import read_records
from common.metrics.table import STEP
from common.model.files import load_policy
from common.model.packing import Sequences, response_logprobs
from common.model.size import model_size
from deploy.audit import run_audit
from deploy.cluster.connection import cluster
from deploy.plan.capacity import engine_needs_gpu
from deploy.plan.needs import needs
from deploy.policy_files import PolicyFiles
from deploy.run.critic import check_critic
from deploy.train import run_training
from deploy.train_critic import run_critic_training
from learner.loop.journal import Journal
from learner.loop.notes import learns
from learner.ppo.critic_files import read_critic
from learner.ppo.learner import Learner
from learner.ranks.group import LearnerGroup
from tests.fakes import save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import varied_batch
from tests.local_run import in_one_process
from tests.metrics_tables import OPTIONAL
from tests.process_memory import Peak, ProcessMemory

pytestmark = pytest.mark.ray

STEPS = 8


def run_config(model, **overrides) -> Config:
    return tiny_config(
        model,
        **{
            "num_steps": STEPS,
            "rollouts_per_step": 32,
            "checkpoint": {"every": 3},
            "ppo": {"clip_eps": 0.2, "ppo_epochs": 2, "minibatches": 4},
            "optimizer": {"learning_rate": 4e-3, "value_head_learning_rate": 1e-2},
            "evaluation": {"prompts": 16, "pass_source": "a_words"},
            **overrides,
        },
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose weights bfloat16 holds exactly, as most models'. The learner then publishes exactly its weights."""
    directory = save_tiny_model(tmp_path_factory.mktemp("model") / "modèle")  # paths must not reach vLLM's metrics
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.to(torch.bfloat16).to(torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def watched(model, tmp_path_factory):
    """One whole run, shared by the tests below, and the memory of its processes."""
    directory = tmp_path_factory.mktemp("Läufe 実行") / "whole"
    with ProcessMemory(os.getpid()).watching() as memory:
        run_training(run_config(model), directory)
    return directory, memory


@pytest.fixture(scope="module")
def finished(watched):
    return watched[0]


def curve(directory) -> list[dict]:
    """Every step's metrics except times and the bytes that were sent, which grow with the number of replicas."""
    records = read_records(directory / "metrics.jsonl")
    apart = {"weights/bytes", "time"}
    return [{k: v for k, v in record.items() if not k.endswith("_s") and k not in apart} for record in records]


def test_the_reward_rises(finished):
    scores = [record["rollout/score/mean"] for record in curve(finished)]
    assert len(scores) == STEPS
    assert scores[0] < 0.6
    assert np.mean(scores[-2:]) > scores[0] + 0.15
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["heldout_prompts"] == 16
    assert summary["pass_at_1_after"] >= summary["pass_at_1_before"]
    assert summary["score_after"] > summary["score_before"]
    assert summary["win_rate"] > 0.5


def test_every_step_is_journalled_on_policy_and_measured_exactly(finished, model):
    journal = Journal(finished / "journal")
    assert journal.next_step == STEPS
    first = journal.read(0).table
    assert first.num_rows == 32
    # Before the first update the policy is the reference, so the service measures from the second step on.
    assert first["ref_logprobs"].null_count == 32
    second = journal.read(1).table.to_pylist()
    reference = load_policy(Path(model), dtype=torch.float32, device=torch.device("cpu"))
    for row in second:
        sequences = Sequences.pack([np.array(row["prompt_ids"])], [np.array(row["response_ids"])])
        expected = response_logprobs(reference, sequences, temperature=1.0)[0].detach().numpy()
        np.testing.assert_allclose(row["ref_logprobs"], expected, atol=1e-4)
    # In step 0 generator (vLLM) and learner (transformers) have the same weights, both in float32.
    assert abs(curve(finished)[0]["mismatch/kl"]) < 1e-8
    for step in journal.since(0):
        assert {version for row in step.table["policy_versions"].to_pylist() for version in row} == {step.step}
    # After each update the generators sample from the published weights, which are rounded to bf16.
    assert all(abs(record["mismatch/kl"]) < 1e-3 for record in curve(finished))


def test_the_figures_are_those_of_a_step_record(finished):
    logged = {
        key.replace("reward/a_words/score", "reward/NAME/score") for key in read_records(finished / "metrics.jsonl")[0]
    }
    assert logged == {metric.key for metric in STEP} - {
        "time/checkpoint_s",  # known only after the record is written
        "reward/NAME/KEY",  # this source gives a number only
        *OPTIONAL,
    }


# Several tests share each run, because starting one takes far longer than its steps.


@pytest.mark.skipif(engine_needs_gpu(), reason="the libraries of a process on a GPU are not measured")
def test_the_peak_of_every_process_is_within_15_percent_of_its_estimate(watched, model):
    _, memory = watched
    estimated = {need.name.partition("(")[0]: need.memory for need in needs(run_config(model), model_size(model))}
    measured = {role: [peak.own for peak in memory.of(role)] for role in estimated}
    assert measured == {role: [pytest.approx(size, rel=0.15)] for role, size in estimated.items()}


VARIANTS = {
    "LoRA": {"lora": {"rank": 4}},
    "two ranks": {"ranks": 2, "cpus": 0.5},
    "a separate critic": {"critic": "separate"},
}


@pytest.mark.skipif(engine_needs_gpu(), reason="the libraries of a process on a GPU are not measured")
def test_peaks_of_other_learners_are_within_15_percent_of_their_estimates(model, tmp_path):
    """Learners alone, one after another on one cluster: their engines and services are those of the test above."""

    async def learns(cfg: Config, directory: Path) -> list[Peak]:
        with ProcessMemory(os.getpid()).watching() as memory:
            learner = LearnerGroup(
                lambda rank: actor(Learner, cfg.learner, f"Learner({rank})").remote(cfg),
                cfg.learner,
                startup_timeout_s=120,
            )
            try:
                await learner.start()
                for step in range(2):
                    await learner.update(varied_batch(step))
                    assert [item async for item in learner.publish()]
                await learner.save(directory)
                await learner.save_policy(directory / "policy")
            finally:
                learner.stop()
        return memory.of("Learner")

    measured, estimated = {}, {}
    with cluster(RayConfig(object_store_mib=128, dashboard=False)):
        for name, settings in VARIANTS.items():
            cfg = run_config(model, learner={"precision": "fp32", **settings})
            peaks = asyncio.run(asyncio.wait_for(learns(cfg, tmp_path / name), 300))
            measured[name] = [peak.own for peak in peaks]
            ranks = [need for need in needs(cfg, model_size(model)) if need.section == "learner"]
            estimated[name] = [pytest.approx(need.memory, rel=0.15) for need in ranks]
    assert measured == estimated


@pytest.fixture(scope="module")
def cut(model, tmp_path_factory):
    """The first five steps with two replicas of every role. Its last checkpoint is left incomplete, as by a crash."""
    directory = tmp_path_factory.mktemp("runs") / "cut"
    twice = {"min": 2}
    cfg = run_config(model, num_steps=5, generators={**twice, "cpus": 0.5}, reference=twice, reward=twice)
    run_training(cfg, directory)
    (directory / "checkpoints/step-000005/COMPLETE").unlink()  # the checkpoint of step 3 and the journal remain
    return directory


def test_the_number_of_replicas_does_not_change_the_curve(finished, cut):
    """A sample depends only on weights, seed and sample id. Its log-probabilities depend on no other row."""
    assert curve(cut)[:5] == curve(finished)[:5]
    generators = Journal(cut / "journal").read(1).table["generator"].to_pylist()
    assert set(generators) == {"Generator(0)", "Generator(1)"}


def test_a_run_that_is_cut_and_resumed_has_the_bits_of_a_whole_one(finished, model, cut):
    run_training(run_config(model), cut, resume=True)
    assert curve(cut) == curve(finished)
    whole, resumed = (Journal(d / "journal") for d in (finished, cut))
    bits = [[j.read(step).table.drop_columns("generator") for step in range(STEPS)] for j in (whole, resumed)]
    assert all(one.equals(other) for one, other in zip(*bits, strict=True))
    weights = [AutoModelForCausalLM.from_pretrained(d / "policy").state_dict() for d in (finished, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert run_audit(cut, replay=True) == 0


def test_with_staleness_allowed_generators_write_while_the_learner_learns(model, tmp_path):
    """With the mask, which needs no importance weight, and two lambdas."""
    directory = tmp_path / "overlapped"
    ppo = {"policy_loss": "mask", "clip_eps": 0.2, "clip_eps_high": 0.28, "ppo_epochs": 2, "minibatches": 4}
    lambdas = {"lam": "length", "lam_alpha": 1.0, "value_lam": 1.0}
    with in_one_process():
        run_training(run_config(model, max_staleness=1, ppo={**ppo, **lambdas, "importance_cap": 0}), directory)
    records = read_records(directory / "metrics.jsonl")
    assert [record["staleness/max"] for record in records] == [0] + [1] * (STEPS - 1)
    assert all(np.isfinite(record["ppo/policy_loss"]) for record in records)
    assert all(0 < record["ppo/masked"] < 1 for record in records)
    assert np.mean([record["rollout/score/mean"] for record in records[-2:]]) > records[0]["rollout/score/mean"] + 0.1
    steps = list(Journal(directory / "journal").since(0))
    ids = [
        key
        for step in steps
        for key in zip(*(step.table[name].to_pylist() for name in ("epoch", "prompt_index", "replica")), strict=True)
    ]
    assert len(set(ids)) == len(ids) == 32 * STEPS
    for step in steps:
        versions = {version for row in step.table["policy_versions"].to_pylist() for version in row}
        assert versions <= {step.step - 1, step.step}
    assert run_audit(directory, replay=True) == 0


@pytest.fixture(scope="module")
def continued(finished, tmp_path_factory):
    """A run of small steps from the policy that another run saved, with a reward that fails on some prompts."""
    directory = tmp_path_factory.mktemp("runs") / "continued"
    cfg = run_config(
        finished / "policy",
        num_steps=3,
        generators={"updates": "changes"},
        optimizer={"learning_rate": 1e-6},
        reward={"sources": [{"name": "a_words", "function": "tests.tasks:fails_on_some"}]},
        evaluation={"prompts": 0},
    )
    with in_one_process():
        run_training(cfg, directory)
    return directory


def test_small_steps_are_sent_as_changes_where_changes_are_wanted(continued, model):
    records = read_records(continued / "metrics.jsonl")
    full = 2 * load_policy(Path(model), dtype=torch.float32, device=torch.device("cpu")).num_parameters()
    assert all(0 < record["weights/bytes"] < full / 2 for record in records)  # the full set went before step 0
    assert all(abs(record["mismatch/kl"]) < 1e-3 for record in records)  # also with updated weights


def test_a_run_can_begin_with_the_policy_that_another_saved(continued):
    table = Journal(continued / "journal").read(0).table
    responses = np.concatenate(table["response_ids"].to_pylist())
    assert np.mean((responses >= 4) & (responses < 34)) > 0.6  # a-words; the untrained model writes a half


def test_rollouts_whose_reward_fails_are_voided_and_counted(continued):
    step = Journal(continued / "journal").read(0)
    assert len(step.voids) == curve(continued)[0]["rollout/voids"] > 0
    assert all("a_words raised ValueError: b3 is not to be scored" in reason for _, reason in step.voids)
    assert not any(prompt.endswith("b3") for prompt in step.table["prompt"].to_pylist())


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "critic").iterdir()}


def test_a_critic_is_trained_from_the_journal_of_a_run(finished, model, tmp_path):
    """Cut after two passes and continued, on two ranks; and without a cut."""
    cfg = run_config(
        model,
        learner={"ranks": 2, "critic": "separate"},
        optimizer={"critic_learning_rate": 3e-3, "value_head_learning_rate": 1e-2},
        critic_training={"passes": 2, "heldout_share": 0.2, "patience": 9},
    )
    more = cfg.model_copy(update={"critic_training": cfg.critic_training.model_copy(update={"passes": 4})})
    summary = run_critic_training(more, tmp_path / "whole", sources=[finished], steps=":6")
    run_critic_training(cfg, tmp_path / "cut", sources=[finished], steps=":6")
    resumed = run_critic_training(more, tmp_path / "cut", resume=True)
    assert {**resumed, "seconds": 0} == {**summary, "seconds": 0}
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert (summary["passes"], summary["training_rollouts"] + summary["heldout_rollouts"]) == (4, 6 * 32)
    assert summary["best_pass"] > 0
    assert summary["explained_variance"] > 0
    critic = str(tmp_path / "cut/critic")
    from_it = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"critic_path": critic})})
    check_critic(from_it, PolicyFiles.load(cfg.model.path))  # a run accepts it
    [trained_on] = read_critic(Path(critic)).trained_on
    assert (trained_on["run"], trained_on["end"], trained_on["rollouts"]) == (str(finished), 6, 192)
    assert trained_on["digest"] == Journal(finished / "journal").digest(6)


def sampled_ids(run: Path) -> list[str]:
    return [sample_id for step in Journal(run / "journal").since(0) for sample_id in step.sample_ids]


def test_a_critic_is_trained_on_sampled_responses_of_the_starting_policy(model, tmp_path):
    """Whole; and as if it had been killed after it had journalled two of four batches."""
    cfg, whole, cut = run_config(model, critic_training={"passes": 2}), tmp_path / "whole", tmp_path / "cut"
    with in_one_process():
        summary = run_critic_training(cfg, whole, sample=100)
    journal = Journal(whole / "journal")
    assert not learns(journal.notes)
    assert [(step.policy_version, step.table.num_rows) for step in journal.since(0)] == [(0, 32)] * 3 + [(0, 4)]
    assert len(set(sampled_ids(whole))) == 100
    [trained_on] = read_critic(whole / "critic").trained_on
    assert (trained_on["rollouts"], trained_on["digest"]) == (100, journal.digest(4))
    assert run_audit(whole) == 0
    cut.mkdir()
    for name in ("run.json", "config.toml", "sample.json"):
        shutil.copy(whole / name, cut)
    shutil.copytree(whole / "journal", cut / "journal", ignore=shutil.ignore_patterns("step-00000[23].*"))
    with in_one_process():
        resumed = run_critic_training(cfg, cut, resume=True)
    assert sampled_ids(cut) == sampled_ids(whole)
    assert {**resumed, "seconds": 0} == {**summary, "seconds": 0}
