"""Batches that cannot be learned from, skipped steps and changed settings, with a real learner."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from common.errors import BatchError, BrokenWeightsError
from learner.ppo.learner import Learner
from learner.ranks.rows import minibatches
from tests.fakes import save_tiny_model
from tests.learner.ppo.test_learner import batch, make_learner, parameters, varied_batch
from tests.learner.ranks.test_checkpoint import assert_same, state
from tests.saving import save_checkpoint_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def with_score(table: pa.Table, score: float) -> pa.Table:
    return with_column(table, "score", [score, *table["score"].to_pylist()[1:]])


def with_ref_logprob(table: pa.Table, value: float) -> pa.Table:
    rows = table["ref_logprobs"].to_pylist()
    rows[-1][0] = value
    return with_column(table, "ref_logprobs", rows)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("normalise", ["mean_std", "none"])
def test_a_total_that_is_not_finite_in_float32_changes_nothing(model, score, normalise):
    sources = [{"name": "a_words", "function": "tests.tasks:a_words"}]
    learner = make_learner(model, reward={"normalise": normalise, "sources": sources})
    learner.update(batch(0))
    before = state(learner)
    with pytest.raises(BatchError, match="a total score, as float32, is not finite"):
        learner.update(with_score(batch(1), score))
    assert_same(state(learner), before)


LOSSES = pytest.mark.parametrize("policy_loss", ["clip", "mask"])


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e38])
@LOSSES
def test_a_loss_that_is_not_finite_changes_no_weight(model, value, policy_loss):
    """1e38 twice, once for each of two tokens, is infinite as a sum in float32."""
    learner = make_learner(model, kl={"coef": 4.0}, ppo={"policy_loss": policy_loss})
    before = parameters(learner)
    with pytest.raises(BatchError, match=r"the loss is not finite \((nan|-?inf)\)"):
        learner.update(with_ref_logprob(varied_batch(0), value))
    assert torch.equal(parameters(learner), before)


def test_a_gradient_that_is_not_finite_changes_no_weight(model):
    learner = make_learner(model)
    weight = next(learner.network.policy.parameters())
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = parameters(learner)
    with pytest.raises(BatchError, match="the gradient's norm is not finite"):
        learner.update(batch(0))
    assert torch.equal(parameters(learner), before)


@pytest.mark.parametrize(
    ("ppo", "what"),
    [
        ({}, "a log-probability under the policy"),
        ({"policy_loss": "mask"}, "a value of the critic"),
        # Without a pass before learning, the first minibatch tells.
        ({"policy_loss": "mask", "advantages": "returns"}, "a log-probability under the policy"),
    ],
)
def test_weights_that_are_broken_before_the_batch_are_told_apart(model, ppo, what):
    learner = make_learner(model, ppo=ppo)
    with torch.no_grad():
        next(learner.network.policy.parameters()).fill_(math.nan)
    with pytest.raises(BrokenWeightsError, match=f"{what} before the update is not finite"):
        learner.update(batch(0))


@LOSSES
def test_weights_that_the_batch_itself_breaks_are_its_own_fault(model, policy_loss):
    learner = make_learner(model, ppo={"policy_loss": policy_loss, "advantages": "returns"})

    def break_weights(*_):
        with torch.no_grad():
            next(learner.network.policy.parameters()).fill_(math.nan)

    learner.optimizer.register_step_post_hook(break_weights)
    with pytest.raises(BatchError, match="the loss is not finite") as caught:
        learner.update(batch(0))
    assert not isinstance(caught.value, BrokenWeightsError)


def test_a_checkpoint_restores_every_bit_after_half_an_update(model, tmp_path):
    """The second of two minibatches is poisoned: the first one has changed the weights."""
    settings = {"ppo": {"minibatches": 2, "ppo_epochs": 1}, "kl": {"controller": "adaptive", "horizon": 20}}
    learner, undisturbed = make_learner(model, **settings), make_learner(model, **settings)
    for one in (learner, undisturbed):
        one.update(varied_batch(0))
    save_checkpoint_of(learner, tmp_path / "step-000001")
    before = parameters(learner)
    learner.network.value_head.weight.register_hook(lambda gradient: next(scales) * gradient)
    scales = iter([1.0, math.nan, 1.0, 1.0])
    with pytest.raises(BatchError, match="the gradient's norm is not finite"):
        learner.update(varied_batch(1))
    assert not torch.equal(parameters(learner), before)
    assert learner.restore(tmp_path / "step-000001") == 1
    assert_same(state(learner), state(undisturbed))
    learner.update(varied_batch(2))
    undisturbed.update(varied_batch(2))
    assert_same(state(learner), state(undisturbed))


def test_a_skipped_step_counts_and_changes_nothing_else(model):
    learner = make_learner(model, optimizer={"schedule": "linear", "learning_rate": 1e-3})
    learner.update(batch(0))
    before = state(learner)
    assert learner.skip() == learner.policy_version == 2
    after = state(learner)
    assert after["numbers"] == (2, *before["numbers"][1:])
    assert_same({**after, "numbers": None}, {**before, "numbers": None})
    # The next step is the third, in its rate and in the order of its rows.
    assert learner.update(batch(1))["ppo/learning_rate"] == pytest.approx(1e-3 * 8 / 10, rel=1e-12)


def test_the_order_of_rows_after_a_skip_is_that_of_the_step(model, monkeypatch):
    seen: list[list[int]] = []
    learner = make_learner(model, ppo={"ppo_epochs": 1, "minibatches": 2})
    original = Learner._minibatch_gradient

    def noted(self, batch, fixed, rows, *others):
        seen.append(rows.tolist())
        return original(self, batch, fixed, rows, *others)

    monkeypatch.setattr(Learner, "_minibatch_gradient", noted)
    learner.skip()
    learner.update(varied_batch(0))
    expected = minibatches(8, epochs=1, parts=2, seed=learner.cfg.seed, step=1)
    assert seen == [rows.tolist() for rows in expected]


def changed(learner: Learner, **sections: dict[str, Any]) -> Any:
    tree = learner.cfg.model_dump(mode="json", exclude_none=True)
    for name, values in sections.items():
        tree[name] |= values
    return type(learner.cfg).model_validate(tree)


def test_changed_settings_apply_from_the_next_step_and_keep_the_state(model):
    learner, other = make_learner(model), make_learner(model)
    for one in (learner, other):
        one.update(varied_batch(0))
    rates = {"learning_rate": 2e-3, "value_head_learning_rate": 3e-3, "weight_decay": 0.2, "betas": (0.7, 0.8)}
    before = state(learner)
    learner.reconfigure(changed(learner, optimizer=rates, ppo={"clip_eps": 0.3}))
    assert_same({**state(learner), "groups": None}, {**before, "groups": None})
    fresh = make_learner(model, optimizer=rates)
    keys = ("peak_lr", "weight_decay", "betas", "eps")
    assert [[group[key] for key in keys] for group in learner.optimizer.param_groups] == [
        [group[key] for key in keys] for group in fresh.optimizer.param_groups
    ]
    assert learner.update(varied_batch(1))["ppo/learning_rate"] == 2e-3
    other.update(varied_batch(1))
    assert not torch.equal(parameters(learner), parameters(other))


def test_a_changed_kl_coefficient_replaces_the_old_one(model):
    learner = make_learner(model, kl={"coef": 0.1, "controller": "adaptive", "horizon": 20, "target": 1e-3})
    learner.update(varied_batch(0))
    adapted = learner.kl_controller.coef
    assert adapted != 0.1
    learner.reconfigure(changed(learner, kl={"target": 2.0}))
    assert learner.kl_controller.coef == adapted  # it goes on adapting from there
    assert learner.kl_controller.target == 2.0
    learner.reconfigure(changed(learner, kl={"coef": 0.7}))
    assert learner.kl_controller.coef == 0.7
    learner.reconfigure(changed(learner, optimizer={"learning_rate": 1e-5}))
    assert learner.kl_controller.coef == 0.7


def test_only_scores_as_wide_as_float32_are_learned_from(model):
    learner = make_learner(model)
    table = with_score(batch(0), float(np.finfo(np.float32).max))
    learner.update(table)
    assert math.isfinite(learner.score_moments.deviation)
    assert learner.score_moments.deviation < 30 * float(pc.stddev(batch(0)["score"]).as_py())
