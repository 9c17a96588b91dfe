"""Human feedback from beginning to end, small: pairs, a reward model on two ranks, PPO against it, a verdict.

The reward model is trained and its scale measured on Ray. The other commands run in one process.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from actors.scoring.reference import ReferencePolicy
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.files import read_records
from common.model.reward_head import content_hash, read_scale
from deploy.evaluation.command import run_evaluation
from deploy.evaluation.texts import load_texts
from deploy.policy_files import PolicyFiles
from deploy.sample_pairs import run_pair_sampling
from deploy.train import run_training
from deploy.train_reward import run_reward_training
from learner.loop.journal import Journal
from tests.event_files import scalars
from tests.fakes import ENGINE_GPUS, save_tiny_model, tiny_config
from tests.local_run import in_one_process

pytestmark = pytest.mark.ray

RAY = {"dashboard": False, "object_store_mib": 256}
GENERATORS = {"dtype": "float32", "kv_cache_mib": 16, "gpus": ENGINE_GPUS}
SAMPLING = {"max_new_tokens": 8}


def reward_config(model, pairs, **overrides) -> RewardTrainingConfig:
    tree = {
        "epochs": 6,
        "pairs_per_step": 16,
        "model": {"path": str(model)},
        "data": {"train": str(pairs), "heldout_pairs": 40, "max_tokens": 32},
        "optimizer": {"learning_rate": 1e-3, "head_learning_rate": 1e-2},
        "learner": {"precision": "fp32"},
        "scale": {"responses": 60},
        "sampling": SAMPLING,
        "generators": GENERATORS,
        "ray": RAY,
    }
    for key, value in overrides.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return RewardTrainingConfig.model_validate(tree)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(model, tmp_path_factory):
    """Two responses to each prompt; the labeller prefers the one with more a-words."""
    directory = tmp_path_factory.mktemp("Läufe 実行") / "pairs"
    cfg = PairSamplingConfig.model_validate(
        {
            "model": {"path": str(model)},
            "prompts": {"source": "tests.tasks:train_prompts", "pairs": 240, "max_tokens": 8},
            "sampling": SAMPLING,
            "generators": GENERATORS,
            "labeller": {"sources": [{"name": "a_words", "function": "tests.tasks:a_words"}]},
            "ray": RAY,
        }
    )
    with in_one_process():
        summary = run_pair_sampling(cfg, directory)
    labelled = read_records(directory / "labelled.jsonl")
    assert sorted(record["pair"] for record in labelled) == list(range(240))
    # After a crash that left half of the lines, the command resumes and ends with the same pairs.
    whole = (directory / "pairs.jsonl").read_bytes()
    (directory / "labelled.jsonl").write_text("".join(json.dumps(record) + "\n" for record in labelled[:100]))
    with in_one_process():
        assert run_pair_sampling(cfg, directory, resume=True)["pairs"] == summary["pairs"]
    assert (directory / "pairs.jsonl").read_bytes() == whole
    return directory / "pairs.jsonl"


@pytest.fixture(scope="module")
def reward(model, pairs, small_engines, tmp_path_factory):
    directory = tmp_path_factory.mktemp("Läufe 実行") / "reward"
    logging = {"sinks": ["tensorboard"]}
    run_reward_training(reward_config(model, pairs, learner={"ranks": 2}, logging=logging), directory)
    return directory


def test_the_labeller_preferred_more_a_words(pairs):
    records = read_records(pairs)
    assert len(records) > 100
    for record in records:
        words = [record[side].split() for side in ("chosen", "rejected")]
        shares = [sum(word.startswith("a") for word in side) / max(1, len(side)) for side in words]
        assert shares == pytest.approx([record["chosen_score"], record["rejected_score"]])
        assert shares[0] > shares[1]


def test_two_ranks_learn_the_preference_and_report_its_interval(reward):
    summary = json.loads((reward / "summary.json").read_text())
    assert summary["accuracy"] > 0.7
    assert summary["heldout_pairs"] >= 40
    assert summary["accuracy_interval"][0] < summary["accuracy"] < summary["accuracy_interval"][1]
    losses = [record["preference/loss"] for record in read_records(reward / "metrics.jsonl")]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)  # a head of zeros gives both sides the same score
    assert np.mean(losses[-5:]) < 0.6
    assert (reward / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_has_every_step_and_evaluation(reward):
    shown = scalars(reward)
    losses = [(record["step"], record["preference/loss"]) for record in read_records(reward / "metrics.jsonl")]
    assert shown["preference/loss"] == [(step, pytest.approx(loss)) for step, loss in losses]
    accuracies = [(record["step"], record["accuracy"]) for record in read_records(reward / "evaluations.jsonl")]
    assert shown["evaluation/accuracy"] == [(step, pytest.approx(accuracy)) for step, accuracy in accuracies]
    assert len(accuracies) == 6


@pytest.fixture(scope="module")
def alone(model, pairs, tmp_path_factory):
    """The config and directory of a training on one rank, without a scale."""
    cfg = reward_config(model, pairs, epochs=2, scale={"responses": 0}, checkpoint={"every": 3, "keep": 99})
    directory = tmp_path_factory.mktemp("runs") / "alone"
    with in_one_process():
        run_reward_training(cfg, directory)
    return cfg, directory


def test_ranks_do_not_change_what_is_learned(alone, reward):
    one_rank, two_ranks = (read_records(directory / "metrics.jsonl") for directory in (alone[1], reward))
    first_epoch = len(one_rank) // 2
    for one, two in zip(one_rank[:first_epoch], two_ranks[:first_epoch], strict=True):
        for key in ("preference/loss", "preference/accuracy", "preference/margin", "preference/grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5), key


def test_reward_training_cut_and_resumed_gives_the_same_model(alone, tmp_path):
    """Killed in the first epoch, two steps after a checkpoint: a copy without all that comes later."""
    (cfg, whole), cut = alone, tmp_path / "cut"
    checkpoints = sorted(path.name for path in (whole / "checkpoints").iterdir())
    losses = [record["preference/loss"] for record in read_records(whole / "metrics.jsonl")]
    assert checkpoints[0] == "step-000003"
    assert len(losses) > 2 * 5  # the kill comes before the end of the first epoch
    later = ("model", "summary.json", "evaluations.jsonl", "calibration.png", *checkpoints[1:])
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns(*later))
    (cut / "metrics.jsonl").write_bytes(b"".join((whole / "metrics.jsonl").read_bytes().splitlines(True)[:5]))
    with in_one_process():
        run_reward_training(cfg, cut, resume=True)
    assert content_hash(cut / "model") == content_hash(whole / "model")
    assert [record["preference/loss"] for record in read_records(cut / "metrics.jsonl")] == losses
    accuracies = [[e["accuracy"] for e in read_records(run / "evaluations.jsonl")] for run in (whole, cut)]
    assert accuracies[0] == accuracies[1]


def test_every_metric_of_reward_training_has_a_row_in_the_docs(reward):
    text = Path("docs/metrics.md").read_text().partition("## Reward training")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE))
    assert set(read_records(reward / "metrics.jsonl")[0]) == documented


@pytest.fixture(scope="module")
def ppo(model, reward, tmp_path_factory):
    """The config and directory of a run against the reward model, judged by the labeller that it learned from."""
    source = {"name": "reward", "model": str(reward / "model"), "dtype": "float32", "max_tokens": 64}
    cfg = tiny_config(
        model,
        num_steps=10,
        rollouts_per_step=32,
        reward={"sources": [source]},
        ppo={"clip_eps": 0.2, "ppo_epochs": 2, "minibatches": 4},
        optimizer={"learning_rate": 4e-3, "value_head_learning_rate": 1e-2},
        evaluation={"prompts": 16, "judges": [{"name": "gold", "function": "tests.tasks:a_words"}], "text_tokens": 99},
    )
    directory = tmp_path_factory.mktemp("runs") / "ppo"
    with in_one_process():
        run_training(cfg, directory)
    return cfg, directory


def test_the_policy_improves_by_the_judge_that_it_never_saw(ppo):
    _, directory = ppo
    summary = json.loads((directory / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert after["components"]["gold"] > before["components"]["gold"] + 0.2
    assert after["components"]["reward"] > before["components"]["reward"] + 0.5
    assert before["kl_per_response"] == pytest.approx(0, abs=1e-3)
    assert after["kl_per_response"] > 0.1


def test_first_scores_are_near_0_with_deviation_1_and_name_their_model(ppo, reward):
    _, directory = ppo
    first = next(iter(Journal(directory / "journal").since(0))).table
    scores = first["score"].to_numpy()
    assert abs(scores.mean()) < 0.5
    assert 0.5 < scores.std() < 1.6
    model = reward / "model"
    assert {tuple(row) for row in first["origins"].to_pylist()[0:1]} == {
        (("reward", f"{model}@{content_hash(model)}"),)
    }
    assert [dict(row) for row in first["components"].to_pylist()] == [{"reward": score} for score in scores]


@pytest.fixture(scope="module")
def compared(ppo, tmp_path_factory):
    """The base and the trained policy, asked three times each."""
    cfg, directory = ppo
    target = tmp_path_factory.mktemp("compared") / "whole"
    with in_one_process():
        return target, run_evaluation(cfg, target, policies={"trained": str(directory / "policy")}, samples=3)


def test_evaluate_compares_the_trained_policy_with_its_base(ppo, compared):
    _, directory = ppo
    whole, record = compared
    summary = json.loads((directory / "summary.json").read_text())
    assert list(record["policies"]) == ["base", "trained"]
    for name, when in (("base", "before"), ("trained", "after")):
        answers = [a for a in read_records(whole / f"answers/{name}.jsonl") if a["sample"] == 0]
        assert len(answers) == 16
        first = np.mean([answer["components"]["gold"] for answer in answers])
        assert first == pytest.approx(summary[when]["components"]["gold"])  # the first sample is the run's own answer
    gold = [figures["components"]["gold"] for figures in record["policies"].values()]
    assert gold[1]["interval"][0] > gold[0]["interval"][1]
    kl = [figures["kl_per_response"] for figures in record["policies"].values()]
    assert kl[0]["value"] == pytest.approx(0, abs=1e-3)
    assert kl[1]["interval"][0] > 0.1
    assert record["policies"]["trained"]["perplexity_ratio"]["shipped"]["value"] != 1
    assert not record["policies"]["trained"]["judges"]["gold"]["proxy_rose_judge_fell"]
    assert "pass_at_k" not in record["policies"]["base"]  # scores of a reward model, and no threshold


def test_the_first_answers_of_an_evaluation_are_those_of_the_run(ppo, compared):
    (cfg, directory), (whole, record) = ppo, compared
    answers = read_records(whole / "answers/trained.jsonl")
    first = sorted((answer for answer in answers if answer["sample"] == 0), key=lambda answer: answer["prompt"])
    of_run = read_records(directory / f"answers/version-{cfg.num_steps:06d}.jsonl")
    for key in ("response", "finish_reason", "score", "components", "origins"):
        assert [answer[key] for answer in first] == [answer[key] for answer in of_run]
    after = json.loads((directory / "summary.json").read_text())["after"]
    assert np.mean([answer["score"] for answer in first]) == pytest.approx(after["score"])
    kl = [sum(answer["logprobs"]) - sum(answer["ref_logprobs"]) for answer in first]
    assert np.mean(kl) == pytest.approx(after["kl_per_response"], rel=1e-3)
    figures = record["policies"]["trained"]
    assert figures["judges"]["gold"]["answers"] == len(answers) == 48
    gold = np.mean([answer["components"]["gold"] for answer in answers])
    assert figures["judges"]["gold"]["score"]["value"] == pytest.approx(gold)
    assert sum(part["tokens"] for part in figures["kl_by_position"]) == sum(len(a["tokens"]) for a in answers)


def test_the_perplexity_of_a_text_is_that_of_the_saved_policy(ppo, compared):
    (cfg, directory), (_, record) = ppo, compared
    [text] = load_texts(cfg, [policy := PolicyFiles.load(str(directory / "policy"))])
    service = ReferencePolicy("ReferencePolicy(0)", cfg.reference, model=policy.path, temperature=1.0)
    nll = -sum(float(logprobs.sum()) for logprobs in service.forward(text.windows))
    found = record["policies"]["trained"]["perplexity"]["shipped"]["value"]
    assert found == pytest.approx(math.exp(nll / 99), rel=1e-5)


def test_an_evaluation_that_was_cut_ends_with_the_same_figures(ppo, compared, tmp_path):
    (cfg, _), (whole, record) = ppo, compared
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "evaluation.json").unlink()
    (cut / "texts/trained.json").unlink()
    answers = cut / "answers/trained.jsonl"
    answers.write_bytes(answers.read_bytes()[:-700])  # in the middle of a line
    kept = read_records(answers)
    assert 0 < len(kept) < 48
    with in_one_process():
        assert run_evaluation(cfg, cut, resume=True) == record
    again = read_records(answers)
    assert again[: len(kept)] == kept  # ... which were not asked again
    assert sorted((a["prompt"], a["sample"]) for a in again) == [(p, s) for p in range(16) for s in range(3)]
    with in_one_process():
        assert run_evaluation(cfg, cut, resume=True) == record  # nothing is missing, so nothing is asked


def test_the_scale_is_that_of_the_policys_own_responses(reward):
    scale = read_scale(reward / "model")
    assert scale.chat is False
    assert scale.deviation > 0
    assert (scale.mean, scale.deviation) != (0.0, 1.0)
