"""Passes that train the critic alone, against a loop written by hand. For two ranks see test_ranks.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import BatchError
from learner.ppo.experience import ExperienceBatch
from learner.ppo.learner import Learner
from tests.fakes import save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import varied_batch

RATES = {"learning_rate": 1e-3, "value_head_learning_rate": 1e-2, "critic_learning_rate": 3e-3, "max_grad_norm": 0.05}
KINDS = ("shared", "separate")
SEED = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def learner_with(model, critic, value_epochs, *, tokens=512, **ppo) -> Learner:
    ppo = {"ppo_epochs": 2, "minibatches": 2, "value_epochs": value_epochs, "value_coef": 0.7, **ppo}
    learner = {"precision": "fp32", "critic": critic, "micro_batch_tokens": tokens}
    return Learner(tiny_config(model, seed=SEED, rollouts_per_step=8, optimizer=RATES, ppo=ppo, learner=learner))


def weights(learner: Learner, *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.network.named_parameters() if name.startswith(prefixes)}


CRITIC = ("value_head", "critic_body")


def states_by_row(learner: Learner, batch: ExperienceBatch) -> list[torch.Tensor]:
    """The state before each response token, by transformers' own pass over each sequence alone."""
    body = learner.network.critic_body or learner.network.policy.base_model
    rows = []
    for ids, prompt in zip(
        batch.sequences.input_ids.split(batch.sequences.lengths.tolist()), batch.sequences.prompt_lengths.tolist()
    ):
        body.set_attn_implementation("eager")
        rows.append(body(input_ids=ids[None], use_cache=False).last_hidden_state[0, prompt - 1 : len(ids) - 1])
        body.set_attn_implementation("packed")
    return rows


@pytest.mark.parametrize("critic", KINDS)
def test_value_epochs_are_a_loop_over_the_value_loss(model, critic):
    """After an update without them, by hand: permutations, loss, clipping and AdamW."""
    learner, table = learner_with(model, critic, 0), varied_batch(0)
    learner.update(table)
    returns = learner.credit()["returns"].to_pylist()
    batch, network = ExperienceBatch.from_table(table), learner.network
    trained = [(network.value_head, 1e-2)] + ([(network.critic_body, 3e-3)] if network.critic_body else [])
    first_losses, last_losses, norms = [], [], []
    for epoch in range(3):
        order = np.random.default_rng([SEED, 0, 2 + epoch]).permutation(8)
        for rows in (order[:4], order[4:]):
            states, errors = states_by_row(learner, batch), []
            if critic == "shared":
                states = [part.detach() for part in states]
            for row in rows:
                for state, wanted in zip(states[row], returns[row], strict=True):
                    value = network.value_head.weight[0] @ state + network.value_head.bias[0]
                    errors.append((value - wanted) ** 2 / 2)
            loss = sum(errors) / len(errors)
            (first_losses if epoch == 0 else last_losses if epoch == 2 else []).append((loss.item(), len(errors)))
            parameters = [p for part, _ in trained for p in part.parameters()]
            gradients = torch.autograd.grad(0.7 * loss, parameters)
            norm = sum((g**2).sum() for g in gradients).sqrt()
            norms.append(norm.item())
            scale = min(1.0, 0.05 / (norm.item() + 1e-6))
            rates = [rate for part, rate in trained for _ in part.parameters()]
            for parameter, gradient, rate in zip(parameters, gradients, rates, strict=True):
                adam = learner.optimizer.state[parameter]
                adam["step"] += 1
                adam["exp_avg"].mul_(0.9).add_(0.1 * scale * gradient)
                adam["exp_avg_sq"].mul_(0.95).add_(0.05 * (scale * gradient) ** 2)
                t = adam["step"].item()
                mean, square = adam["exp_avg"] / (1 - 0.9**t), adam["exp_avg_sq"] / (1 - 0.95**t)
                parameter.data -= rate * mean / (square.sqrt() + 1e-8)
    found = learner_with(model, critic, 3)
    metrics = found.update(table)
    for name, expected in weights(learner, *CRITIC).items():
        torch.testing.assert_close(weights(found, *CRITIC)[name], expected, atol=2e-5, rtol=1e-4, msg=name)
    for key, losses in (("first", first_losses), ("last", last_losses)):
        mean = sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
        assert metrics[f"value/epochs/{key}_loss"] == pytest.approx(mean, rel=1e-4)
    assert metrics["value/epochs/grad_norm"] == pytest.approx(max(norms), rel=1e-4)
    assert metrics["value/epochs/last_loss"] < metrics["value/epochs/first_loss"]
    assert 0 < metrics["time/value_epochs_s"] < metrics["time/optimise_s"]


@pytest.mark.parametrize("critic", KINDS)
def test_value_epochs_do_not_change_the_policy(model, critic):
    without, with_them = learner_with(model, critic, 0), learner_with(model, critic, 2)
    for learner in (without, with_them):
        learner.update(varied_batch(0))
    for name, value in weights(without, "policy").items():
        assert torch.equal(weights(with_them, "policy")[name], value), name
    moved = weights(without, *CRITIC)
    assert not any(torch.equal(value, moved[name]) for name, value in weights(with_them, *CRITIC).items())


@pytest.mark.parametrize("critic", KINDS)
def test_micro_batches_do_not_change_value_epochs(model, critic):
    some, one = learner_with(model, critic, 2, tokens=9), learner_with(model, critic, 2)
    found, expected = (learner.update(varied_batch(0)) for learner in (some, one))
    for key in ("value/epochs/first_loss", "value/epochs/last_loss", "value/epochs/grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)


def test_value_epochs_run_although_target_kl_ended_the_policys_passes(model):
    learner, steps = learner_with(model, "separate", 2, target_kl=1e-12), []

    def keep(*_):
        steps.append({n.partition(".")[0] for n, p in learner.network.named_parameters() if p.grad is not None})

    learner.optimizer.register_step_pre_hook(keep)
    metrics = learner.update(varied_batch(0))
    assert metrics["ppo/optimizer_steps"] == 1
    assert steps == [{"policy", *CRITIC}] + 4 * [set(CRITIC)]


def test_without_a_critic_there_are_no_value_epochs(model):
    metrics = learner_with(model, "separate", 2, advantages="returns").update(varied_batch(0))
    assert not [key for key in metrics if "value" in key]


def test_a_value_loss_that_is_not_finite_voids_the_batch(model, monkeypatch):
    learner = learner_with(model, "shared", 1)
    monkeypatch.setattr(
        "learner.ppo.policy.values_of_states", lambda head, states: states.values.sum(-1) * head.bias / 0
    )
    with pytest.raises(BatchError, match="the loss of the critic alone is not finite"):
        learner.update(varied_batch(0))
