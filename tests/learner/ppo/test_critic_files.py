"""A trained critic on disk. For several ranks see tests/learner/ranks/test_ranks.py."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from common.config.ppo import LearnerConfig
from common.errors import UserError
from common.model.files import resolve_model
from common.model.identity import model_digest
from learner.ppo.critic_files import CriticBasis, CriticSource, TrainedCritic, read_critic, save_critic
from learner.ppo.experience import ExperienceBatch
from learner.ppo.learner import Learner
from learner.ppo.policy import PolicyWithCritic
from learner.ppo.scores import RunningMoments
from tests.fakes import save_tiny_kind, save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import varied_batch
from tests.learner.ppo.test_lora import sequences

CPU = torch.device("cpu")
FAST = {"learning_rate": 1e-2, "value_head_learning_rate": 1e-2, "critic_learning_rate": 1e-2}
LORA = {"rank": 4, "alpha": 8}


def record(kind: str = "separate", **changes) -> TrainedCritic:
    sources = (CriticSource("a_words", 1.0, "2" * 64, {}), CriticSource("judge", -0.5, None, {"request": {"a": [1]}}))
    basis = {"kind": kind, "model": "0" * 64, "tokenizer": "1" * 64, "sources": sources, "normalise": "mean_std"}
    basis |= {
        "clip": 5.0,
        "gamma": 1.0,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "responses": {"sampling.top_p": 1.0},
    } | changes
    trained_on = [{"directory": "runs/first", "steps": 3, "digest": "2" * 64, "rollouts": 24}]
    return TrainedCritic(CriticBasis(**basis), RunningMoments(24, 0.5, 6.0), trained_on, [{"loss": 0.25}])


def trained(model: Path, **fields) -> Learner:
    """After two updates, which change every weight of the critic."""
    settings = {"precision": "fp32", "critic": "separate", **fields}
    learner = Learner(tiny_config(model, rollouts_per_step=8, optimizer=FAST, learner=settings))
    for seed in range(2):
        learner.update(varied_batch(seed))
    return learner


def saved(learner: Learner, directory: Path) -> Path:
    tensors, base = dict(learner.network.critic_tensors()), resolve_model(learner.cfg.model.path)
    save_critic(directory, tensors, record(learner.cfg.learner.critic), base=base)
    return directory


def loaded(model: Path, directory: Path, **fields) -> PolicyWithCritic:
    cfg = LearnerConfig(**{"precision": "fp32", "critic": "separate", **fields})
    return PolicyWithCritic.load(model, cfg, CPU, has_critic=True, seed=0, critic=directory)


def values(network: PolicyWithCritic) -> torch.Tensor:
    with torch.no_grad():
        return network(sequences(), temperature=1.0)[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    return saved(trained(model), tmp_path_factory.mktemp("critic") / "critic")


@pytest.fixture
def critic(written, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "critic"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "glm4_moe"])
def test_a_separate_critic_is_loaded_with_the_bits_that_were_trained(tmp_path, kind):
    base = save_tiny_model(tmp_path / "base") if kind == "llama" else save_tiny_kind(tmp_path / "base", kind)
    learner = trained(base)
    network = loaded(base, saved(learner, tmp_path / "critic"))
    for name, tensor in learner.network.critic_body.state_dict().items():
        assert torch.equal(network.critic_body.state_dict()[name], tensor), name
    assert torch.equal(values(network), values(learner.network))
    assert values(network).abs().max() > 0.1
    fresh = PolicyWithCritic.load(base, learner.cfg.learner, CPU, has_critic=True, seed=0)
    for name, tensor in fresh.policy.state_dict().items():  # the policy starts from its own checkpoint
        assert torch.equal(network.policy.state_dict()[name], tensor), name


def test_transformers_loads_a_separate_critic_and_its_tokenizer(model, written):
    network = AutoModel.from_pretrained(written)
    assert network.dtype == torch.float32
    mine = loaded(model, written).critic_body.state_dict()
    assert {name: tensor.tolist() for name, tensor in network.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in mine.items()
    }
    assert AutoTokenizer.from_pretrained(written).get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()


def test_a_shared_critic_is_a_head_alone(model, tmp_path):
    learner = trained(model, critic="shared")
    directory = saved(learner, tmp_path / "critic")
    assert sorted(path.name for path in directory.iterdir()) == ["critic.json", "value_head.safetensors"]
    network = loaded(model, directory, critic="shared")
    assert network.critic_body is None
    assert torch.equal(network.value_head.weight, learner.network.value_head.weight)
    assert torch.equal(network.value_head.bias, learner.network.value_head.bias)


def test_adapters_are_merged_and_new_ones_start_from_there(model, tmp_path):
    learner = trained(model, lora=LORA)
    directory = saved(learner, tmp_path / "critic")
    assert not any("lora" in name for name in load_file(directory / "model.safetensors"))
    for fields in ({}, {"lora": LORA}):
        torch.testing.assert_close(
            values(loaded(model, directory, **fields)), values(learner.network), atol=1e-5, rtol=1e-5
        )


def test_a_learner_begins_with_the_critic_and_its_score_moments(model, written):
    """Its first old values are those of the critic, and its statistics those of 24 scores and of the 8 of the batch."""
    table = varied_batch(5)
    settings = {"precision": "fp32", "critic": "separate", "critic_path": str(written)}
    learner = Learner(tiny_config(model, rollouts_per_step=8, learner=settings))
    assert asdict(learner.score_moments) == asdict(record().score_moments)
    metrics = learner.update(table)
    batch = ExperienceBatch.from_table(table)
    with torch.no_grad():
        expected = loaded(model, written)(batch.sequences, temperature=1.0)[2]
    assert metrics["value/mean"] == pytest.approx(expected[batch.mask].mean().item(), abs=1e-5)
    scores = np.array(table["score"].to_pylist())
    mean = (24 * 0.5 + scores.sum()) / 32
    squares = 6.0 + 24 * 0.5**2 + (scores**2).sum() - 32 * mean**2
    assert metrics["reward/running_mean"] == pytest.approx(mean, abs=1e-6)
    assert metrics["reward/running_std"] == pytest.approx((squares / 32) ** 0.5, abs=1e-6)


def test_a_rank_refuses_a_critic_that_was_replaced_meanwhile(model, critic):
    cfg = tiny_config(model, learner={"precision": "fp32", "critic": "separate", "critic_path": str(critic)})
    digest = model_digest(critic)
    Learner(cfg, critic_digest=digest)
    damaged_record(critic, passes=[{"loss": 1.0}])
    with pytest.raises(UserError, match=rf"has changed since the run began: its SHA-256 is .*, and was {digest[:12]};"):
        Learner(cfg, critic_digest=digest)


def test_the_record_is_read_as_it_was_written(written):
    assert read_critic(written) == record()


def damaged_record(critic: Path, **changes) -> None:
    path = critic / "critic.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut_short(critic: Path) -> None:
    path = critic / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


DAMAGE = {
    "gone": (shutil.rmtree, "has no critic.json; name a directory that ratchet train-critic has written"),
    "no head": (lambda d: (d / "value_head.safetensors").unlink(), "its value_head.safetensors is missing"),
    "cut short": (cut_short, "its model.safetensors is not the file that was written"),
    "no json": (lambda d: (d / "critic.json").write_text("{"), "cannot start a critic"),
    "no object": (lambda d: (d / "critic.json").write_text("[]"), "its critic.json is damaged"),
    "layout": (lambda d: damaged_record(d, layout=2), "has layout 2, and this version of Ratchet reads 3"),
    "no basis": (lambda d: damaged_record(d, basis={}), "basis.kind in its critic.json is wrong"),
    "NaN": (
        lambda d: damaged_record(d, score_moments={"count": 1, "mean": float("nan"), "squares": 0.0}),
        "the statistics of its scores are not finite",
    ),
    "moments": (
        lambda d: damaged_record(d, score_moments={"count": 1, "mean": None, "squares": 0.0}),
        "score_moments.mean in its critic.json is wrong",
    ),
    "files": (lambda d: damaged_record(d, files={}), "does not name value_head.safetensors"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_critic_is_refused_in_one_sentence(critic, damage, message):
    damage(critic)
    with pytest.raises(UserError, match=r"learner\.critic_path") as error:
        read_critic(critic)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_head_of_another_width_is_refused(model, critic):
    save_file({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, critic / "value_head.safetensors")
    with pytest.raises(UserError, match=r"its value head has a weight of shape \[1, 3\], the run's \[1, 64\]"):
        loaded(model, critic)


def test_weights_that_are_missing_are_refused(model, critic):
    tensors = load_file(critic / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, critic / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"norm\.weight is not in its files"):
        loaded(model, critic)


def test_a_failed_save_leaves_the_critic_that_was_there(model, written, critic):
    before = {path.name: path.read_bytes() for path in critic.iterdir()}
    with pytest.raises(AttributeError):
        save_critic(critic, {"value_head.weight": None}, record(), base=model)
    assert {path.name: path.read_bytes() for path in critic.iterdir()} == before
    assert [path.name for path in critic.parent.iterdir()] == ["critic"]
