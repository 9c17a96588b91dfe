"""Learning rates of the parts, weight decay, and the schedule."""

import math

import pytest
import torch
from torch import nn

from common.config.ppo import OptimizerConfig
from learner.ppo.policy import PolicyWithCritic
from learner.ranks.optimizer import learning_rate_scale, make_optimizer, set_learning_rate

CFG = OptimizerConfig(
    learning_rate=0.01, critic_learning_rate=0.02, value_head_learning_rate=0.04, weight_decay=0.5, eps=1e-8
)


def stand_in(*, separate=True):
    network = nn.Module()
    network.policy = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    network.critic_body = nn.Linear(4, 4) if separate else None
    network.value_head = nn.Linear(4, 1)
    return network


def optimizer_of(network):
    return make_optimizer(PolicyWithCritic.parts(network, CFG), CFG)


@pytest.mark.parametrize("separate", [True, False])
def test_every_parameter_has_the_rate_of_its_part_and_only_matrices_decay(separate):
    network = stand_in(separate=separate)
    found = {}
    for group in optimizer_of(network).param_groups:
        assert (group["betas"], group["eps"], group["peak_lr"]) == (CFG.betas, CFG.eps, group["lr"])
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = group["lr"], group["weight_decay"]
    rates = {"policy": 0.01, "critic_body": 0.02, "value_head": 0.04}
    expected = {
        id(p): (rates[name.split(".")[0]], 0.0 if name.endswith("bias") or name == "policy.2.weight" else 0.5)
        for name, p in network.named_parameters()
    }
    assert found == expected


def test_each_part_learns_at_its_own_rate_whatever_came_before():
    parts = [nn.Linear(2, 2, bias=False), nn.Linear(3, 1, bias=False)]
    optimizer = make_optimizer(list(zip(parts, (0.4, 0.1))), OptimizerConfig())
    for scale, rates in {0.5: [0.2, 0.05], 0.25: [0.1, 0.025], 1.0: [0.4, 0.1], 0.0: [0.0, 0.0]}.items():
        set_learning_rate(optimizer, scale)  # a share of the peak, not of the rate before
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates, abs=1e-12)
    set_learning_rate(optimizer, 0.5)
    before = [part.weight.detach().clone() for part in parts]
    for part in parts:
        part.weight.grad = torch.full_like(part.weight, 3.0)
    optimizer.step()  # Adam's first step is rate * sign(g)
    for part, old, rate in zip(parts, before, (0.2, 0.05)):
        torch.testing.assert_close(old - part.weight.detach(), torch.full_like(old, rate), atol=1e-6, rtol=0)


def test_frozen_parameters_are_left_out():
    network = stand_in()
    network.policy.requires_grad_(False)
    network.critic_body.bias.requires_grad_(False)
    chosen = [p for group in optimizer_of(network).param_groups for p in group["params"]]
    names = {name for name, p in network.named_parameters() if any(p is q for q in chosen)}
    assert names == {"critic_body.weight", "value_head.weight", "value_head.bias"}


def test_weights_shared_within_a_part_are_stepped_once():
    network = stand_in(separate=False)
    network.policy.append(nn.Linear(4, 5, bias=False))
    network.policy[3].weight = network.policy[0].weight
    chosen = [id(p) for group in optimizer_of(network).param_groups for p in group["params"]]
    assert chosen.count(id(network.policy[0].weight)) == 1


def test_the_first_step_moves_each_weight_by_its_rate_and_decays_matrices():
    # Adam's first step is rate * g / (|g| + eps), so rate * sign(g); before it a matrix shrinks by rate * 0.5.
    network = stand_in()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.where(torch.arange(p.numel()).reshape(p.shape) % 2 == 0, 3.0, -0.2)
    optimizer_of(network).step()
    for name, rate in {"policy.1": 0.01, "critic_body": 0.02, "value_head": 0.04}.items():
        for kind, keep in {"weight": 1 - rate * 0.5, "bias": 1.0}.items():
            new, old = network.get_parameter(f"{name}.{kind}"), before[f"{name}.{kind}"]
            for i, (n, o) in enumerate(zip(new.flatten().tolist(), old.flatten().tolist(), strict=True)):
                assert n == pytest.approx(o * keep - rate * (1 if i % 2 == 0 else -1), abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_is_a_line_that_reaches_the_peak_when_it_ends(schedule):
    cfg = OptimizerConfig(schedule=schedule, warmup_steps=3)
    assert [learning_rate_scale(step, 10, cfg) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "scales"),
    [
        # Two steps of warm-up, then eight: steps 2, 4, 6, 10 have a share of 0, 1/4, 1/2, 1 of the way behind them.
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.0, 0.0]),
        ("cosine", [1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.0, 0.0]),  # (1 + cos(45 degrees)) / 2 at a quarter
    ],
)
def test_after_warm_up_the_schedule_falls_to_zero_and_stays_there(schedule, scales):
    cfg = OptimizerConfig(schedule=schedule, warmup_steps=2)
    found = [learning_rate_scale(step, 10, cfg) for step in (2, 4, 6, 10, 14)]
    assert found == pytest.approx(scales, abs=1e-12)


def test_the_last_step_runs_at_the_share_that_the_config_says():
    # Two steps of warm-up and eight after it: the last one is at 1 / 8 of the peak.
    assert learning_rate_scale(9, 10, OptimizerConfig(schedule="linear", warmup_steps=2)) == pytest.approx(1 / 8)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_step_of_a_run_has_a_rate_above_zero(schedule):
    for warmup_steps in (0, 4, 5, 9):
        cfg = OptimizerConfig(schedule=schedule, warmup_steps=warmup_steps)
        assert all(0 < learning_rate_scale(step, 5, cfg) <= 1 for step in range(5))
