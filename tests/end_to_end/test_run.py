"""The real thing, small: Ray, vLLM, reference, reward, learner and weight sync, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.config.ppo import Config
from common.errors import UserError
from common.files import read_records
from common.metrics.table import STEP
from common.model.files import load_policy
from common.model.packing import Sequences, response_logprobs
from deploy.train import run_training
from learner.loop.journal import Journal
from tests.fakes import save_tiny_model, tiny_config

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
    """Weights that bfloat16 holds exactly, as most models' are: what is published then is just what the learner has."""
    directory = save_tiny_model(tmp_path_factory.mktemp("model") / "modèle")  # paths must not reach vLLM's metrics
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.to(torch.bfloat16).to(torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """One whole run, shared by the tests below."""
    directory = tmp_path_factory.mktemp("Läufe 実行") / "whole"
    run_training(run_config(model), directory)
    return directory


def curve(directory) -> list[dict]:
    """Every step's metrics but the clock's, and what was sent, which grows with the replicas."""
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
    # Before any update the policy is the reference, and nothing measures it; from then on the service does.
    assert first["ref_logprobs"].null_count == 32
    second = journal.read(1).table.to_pylist()
    reference = load_policy(Path(model), dtype=torch.float32, device=torch.device("cpu"))
    for row in second:
        sequences = Sequences.pack([np.array(row["prompt_ids"])], [np.array(row["response_ids"])])
        expected = response_logprobs(reference, sequences, temperature=1.0)[0].detach().numpy()
        np.testing.assert_allclose(row["ref_logprobs"], expected, atol=1e-4)
    # Generator (vLLM) and learner (transformers) are one model then: float32 on both sides.
    assert abs(curve(finished)[0]["mismatch/kl"]) < 1e-8
    for step in journal.since(0):
        assert {version for row in step.table["policy_versions"].to_pylist() for version in row} == {step.step}
    # After each update the generators really sample from the published weights, but for their rounding to bf16.
    assert all(abs(record["mismatch/kl"]) < 1e-3 for record in curve(finished))


def test_the_figures_are_those_of_a_step_record(finished):
    logged = {
        key.replace("reward/a_words/score", "reward/NAME/score") for key in read_records(finished / "metrics.jsonl")[0]
    }
    assert logged == {metric.key for metric in STEP} - {
        "time/checkpoint_s",  # which is known only afterwards
        "reward/NAME/KEY",  # this source gives a number alone
    }


def test_one_seed_gives_one_curve_also_when_the_run_is_cut_and_resumed(finished, model, tmp_path):
    directory = tmp_path / "cut"
    run_training(run_config(model, num_steps=5), directory)
    assert curve(directory) == curve(finished)[:5]
    # As if the process had died while it wrote its last checkpoint: step 3 and the journal after it must do.
    (directory / "checkpoints/step-000005/COMPLETE").unlink()
    run_training(run_config(model), directory, resume=True)
    assert curve(directory) == curve(finished)
    whole, cut = (Journal(d / "journal") for d in (finished, directory))
    assert all(whole.read(step).table.equals(cut.read(step).table) for step in range(STEPS))
    weights = [AutoModelForCausalLM.from_pretrained(d / "policy").state_dict() for d in (finished, directory)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_with_staleness_allowed_generators_write_while_the_learner_learns(model, tmp_path):
    directory = tmp_path / "overlapped"
    run_training(run_config(model, max_staleness=1), directory)
    records = read_records(directory / "metrics.jsonl")
    assert [record["staleness/max"] for record in records] == [0] + [1] * (STEPS - 1)
    assert all(np.isfinite(record["ppo/policy_loss"]) for record in records)
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


def test_the_number_of_replicas_does_not_change_the_curve(finished, model, tmp_path):
    """Sampling depends on weights, seed and sample id alone, and measuring on nobody's company."""
    directory = tmp_path / "replicas"
    twice = {"min": 2}
    cfg = run_config(model, num_steps=2, generators={**twice, "cpus": 0.5}, reference=twice, reward=twice)
    run_training(cfg, directory)
    assert curve(directory) == curve(finished)[:2]
    generators = Journal(directory / "journal").read(1).table["generator"].to_pylist()
    assert set(generators) == {"Generator(0)", "Generator(1)"}


def test_small_steps_are_sent_as_changes_where_they_are_wanted(model, tmp_path):
    cfg = run_config(
        model,
        num_steps=3,
        generators={"updates": "changes"},
        optimizer={"learning_rate": 1e-6},
        evaluation={"prompts": 0},
    )
    run_training(cfg, tmp_path / "changes")
    records = read_records(tmp_path / "changes/metrics.jsonl")
    full = 2 * load_policy(Path(model), dtype=torch.float32, device=torch.device("cpu")).num_parameters()
    assert all(0 < record["weights/bytes"] < full / 2 for record in records)  # the full set went out before the first
    assert all(abs(record["mismatch/kl"]) < 1e-3 for record in records)  # the last one's rollouts are of such weights


def test_the_final_policy_loads_in_vllm_and_has_changed(finished, model):
    from tests.end_to_end.test_vllm_engine import in_engine

    [batch] = in_engine(finished / "policy", "float32")
    responses = np.concatenate([rollout.response_ids for rollout in batch])
    assert np.mean((responses >= 4) & (responses < 34)) > 0.6  # a-words, which half of them were at first


def test_rollouts_whose_reward_fails_are_voided_and_counted(model, tmp_path):
    sources = [{"name": "a_words", "function": "tests.tasks:fails_on_some"}]
    directory = tmp_path / "voids"
    run_training(run_config(model, num_steps=1, reward={"sources": sources}, evaluation={"prompts": 0}), directory)
    step = Journal(directory / "journal").read(0)
    assert len(step.voids) == curve(directory)[0]["rollout/voids"] > 0
    assert all("a_words raised ValueError: b3 is not to be scored" in reason for _, reason in step.voids)
    assert not any(prompt.endswith("b3") for prompt in step.table["prompt"].to_pylist())


def test_a_run_that_cannot_be_placed_is_refused_and_leaves_nothing(model, tmp_path):
    with pytest.raises(UserError, match=r"no node has room for Generator.*CPUs"):
        run_training(run_config(model, generators={"cpus": 1000}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
