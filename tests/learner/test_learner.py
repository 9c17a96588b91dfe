"""One update of a tiny real model: what it changes, and what must not change it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from common.types import experience_table
from learner.learner import Learner
from tests.fakes import make_experience, save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def batch(seed: int = 0, count: int = 8) -> pa.Table:
    """Ragged rollouts; those that begin with token 4 score 1, the others 0."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        first = 4 if index % 2 else 40
        response = [first, *rng.integers(4, 60, rng.integers(0, 6)).tolist(), 1]
        rows.append(make_experience(index, response, score=float(first == 4)))
    return experience_table(rows)


def make_learner(model, **overrides) -> Learner:
    return Learner(tiny_config(model, rollouts_per_step=8, num_steps=10, **overrides))


def parameters(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.network.parameters()])


def first_token_logprob(learner: Learner, token: int) -> float:
    with torch.no_grad():
        logits = learner.network.policy(torch.tensor([[3, 4]])).logits[0, -1]
    return logits.log_softmax(-1)[token].item()


def test_updates_raise_what_scores_and_lower_what_does_not(model):
    learner = make_learner(model)
    before = {token: first_token_logprob(learner, token) for token in (4, 40)}
    for _ in range(3):
        learner.update(batch())
    assert first_token_logprob(learner, 4) > before[4] + 0.1
    assert first_token_logprob(learner, 40) < before[40] - 0.1
    assert learner.policy_version == 3


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_micro_batches_do_not_change_the_update(model, critic):
    results = []
    for tokens in (16, 40, 2048):
        learner = make_learner(model, learner={"precision": "fp32", "critic": critic, "micro_batch_tokens": tokens},
                               reference={"max_batch_tokens": 2048})  # fmt: skip
        stats = learner.update(batch())
        results.append((parameters(learner), stats))
    for found, stats in results[1:]:
        # Adam divides by the gradient's size, so rounding shows in the weights at the scale of the learning rate.
        assert torch.allclose(found, results[0][0], atol=2e-5)
        for key in ("ppo/policy_loss", "value/loss", "ppo/entropy", "ppo/grad_norm", "kl/per_token", "ppo/approx_kl"):
            assert stats[key] == pytest.approx(results[0][1][key], rel=1e-4, abs=1e-6), key


def test_two_learners_on_one_journal_agree_bit_for_bit(model):
    one, other = make_learner(model), make_learner(model)
    for seed in range(2):
        assert {k: v for k, v in one.update(batch(seed)).items() if not k.startswith("time/")} == {
            k: v for k, v in other.update(batch(seed)).items() if not k.startswith("time/")
        }
    assert torch.equal(parameters(one), parameters(other))


@pytest.mark.parametrize("controller", ["fixed", "adaptive"])
def test_a_restored_learner_goes_on_bit_for_bit(model, tmp_path, controller):
    kl = {"controller": controller, "horizon": 100}
    whole = make_learner(model, kl=kl)
    whole.update(batch(0))
    whole.save(tmp_path / "step-000001")
    whole.update(batch(1))
    restored = make_learner(model, kl=kl)
    assert restored.load(tmp_path / "step-000001") == 1
    restored.update(batch(1))
    assert torch.equal(parameters(restored), parameters(whole))
    assert restored.kl.coef == whole.kl.coef


def test_the_first_values_are_zero_and_the_critic_learns_the_score(model):
    learner = make_learner(model, kl={"coef": 0.0}, optimizer={"value_head_learning_rate": 3e-2})
    first = learner.update(batch())
    assert first["value/mean"] == 0.0
    assert first["value/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    for _ in range(8):
        last = learner.update(batch())
    assert last["value/explained_variance"] > 0.5


def test_critic_warmup_leaves_the_policy_alone(model):
    learner = make_learner(model, learner={"precision": "fp32", "critic_warmup_steps": 1})
    before = [p.detach().clone() for p in learner.network.policy.parameters()]
    learner.update(batch())
    assert all(torch.equal(old, new) for old, new in zip(before, learner.network.policy.parameters()))
    assert learner.network.value_head.weight.abs().max() > 0
    learner.update(batch())
    assert not all(torch.equal(old, new) for old, new in zip(before, learner.network.policy.parameters()))


def test_a_step_that_has_moved_too_far_ends_early(model):
    ppo = {"ppo_epochs": 4, "minibatches": 2}
    free = make_learner(model, ppo=ppo, optimizer={"learning_rate": 1e-2})
    assert free.update(batch())["ppo/optimizer_steps"] == 8
    bound = make_learner(model, ppo={**ppo, "target_kl": 1e-3}, optimizer={"learning_rate": 1e-2})
    assert bound.update(batch())["ppo/optimizer_steps"] < 8


def test_bf16_stays_near_float32(model):
    exact = make_learner(model).update(batch())
    rounded = make_learner(model, learner={"precision": "bf16"}).update(batch())
    for key in ("ppo/policy_loss", "value/loss", "ppo/entropy", "kl/per_token"):
        assert rounded[key] == pytest.approx(exact[key], rel=0.02, abs=0.02), key


def test_empty_and_one_token_responses_are_harmless(model):
    rows = [make_experience(0, [], score=5.0), make_experience(1, [1], score=1.0), make_experience(2, [4, 5, 1])]
    learner = Learner(tiny_config(model, rollouts_per_step=3, ppo={"minibatches": 3}))
    stats = learner.update(experience_table(rows))
    assert all(np.isfinite(value) for value in stats.values())
    assert torch.isfinite(parameters(learner)).all()


def test_published_weights_are_the_policy_rounded_to_bf16(model):
    learner = make_learner(model)
    learner.update(batch())
    weights = learner.publish()
    weights.verify()
    named = dict(learner.network.policy.named_parameters())
    assert weights.version == 1
    assert dict(weights.tensors()).keys() == named.keys()
    assert all(torch.equal(t, named[name].detach().bfloat16()) for name, t in weights.tensors())


def test_the_saved_policy_is_a_hugging_face_directory(model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    learner = make_learner(model)
    learner.update(batch())
    learner.save_policy(tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert loaded.dtype == torch.bfloat16
    for (name, found), kept in zip(loaded.named_parameters(), learner.network.policy.parameters(), strict=True):
        assert torch.equal(found, kept.detach().bfloat16()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").decode([4, 5]) == "a0 a1"


def scaled(table: pa.Table, factor: float, offset: float) -> pa.Table:
    """The same rollouts, scored in another unit."""
    scores = pa.array(table["score"].to_numpy() * factor + offset)
    return table.set_column(table.schema.get_field_index("score"), "score", scores)


def curve_in_unit(model, factor: float, offset: float, **reward) -> tuple[list[dict[str, float]], torch.Tensor]:
    sources = [{"name": "a_words", "function": "tests.tasks:a_words"}]
    learner = make_learner(model, reward={"sources": sources, **reward})
    stats = [learner.update(scaled(batch(seed), factor, offset)) for seed in range(4)]
    skipped = ("time/", "reward/")  # the clock, and the statistics in the score's own unit
    return [{k: v for k, v in s.items() if not k.startswith(skipped)} for s in stats], parameters(learner)


@pytest.mark.parametrize(("factor", "offset"), [(1000.0, 0.0), (5e8, 3e8), (1e-6, -2.0)])
def test_learning_does_not_depend_on_the_unit_or_origin_of_the_score(model, factor, offset):
    expected, weights = curve_in_unit(model, 1.0, 0.0)
    found, found_weights = curve_in_unit(model, factor, offset)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert torch.allclose(found_weights, weights, atol=1e-4)


def test_without_normalisation_the_unit_does_matter(model):
    expected, _ = curve_in_unit(model, 1.0, 0.0, normalise="none")
    found, _ = curve_in_unit(model, 1000.0, 0.0, normalise="none")
    assert found[0]["value/returns_var"] > 1e4 * expected[0]["value/returns_var"]


def test_score_statistics_are_restored_with_the_learner(model, tmp_path):
    learner = make_learner(model)
    learner.update(batch(0))
    learner.save(tmp_path / "step-000001")
    restored = make_learner(model)
    restored.load(tmp_path / "step-000001")
    assert restored.score_moments == learner.score_moments
    assert restored.score_moments.count == 8
