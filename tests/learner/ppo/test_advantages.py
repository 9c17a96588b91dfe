"""GAE against its definition, in Python floats, on unpadded rows."""

import math

import pytest
import torch

from learner.ppo.advantages import gae

LENGTHS, WIDTH = [5, 0, 1, 3, 6], 7


def ragged(garbage):
    torch.manual_seed(0)
    rewards, values = torch.randn(2, len(LENGTHS), WIDTH, dtype=torch.float64)
    mask = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.bool)
    for b, n in enumerate(LENGTHS):
        mask[b, :n] = True
        rewards[b, n:] = values[b, n:] = garbage
    return rewards, values, mask


def sum_of_deltas(rewards, values, gamma, lam):
    """Eq. 16: A_t = sum over l of (gamma lam)^l delta_(t+l), delta_t = r_t + gamma V_(t+1) - V_t, V after the end 0."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [math.fsum((gamma * lam) ** i * d for i, d in enumerate(deltas[t:])) for t in range(len(rewards))]


def average_of_n_step_advantages(rewards, values, gamma, lam):
    """The mean that GAE is defined as: weights (1 - lam) lam^(n-1), all those past the end on the full return."""

    def n_step(t, n):
        gain = math.fsum(gamma**i * r for i, r in enumerate(rewards[t : t + n]))
        return gain + (gamma**n * values[t + n] if t + n < len(values) else 0.0) - values[t]

    advantages = []
    for t in range(len(rewards)):
        left = len(rewards) - t
        early = math.fsum((1 - lam) * lam ** (n - 1) * n_step(t, n) for n in range(1, left))
        advantages.append(early + lam ** (left - 1) * n_step(t, left))
    return advantages


@pytest.mark.parametrize("definition", [sum_of_deltas, average_of_n_step_advantages])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (0.7, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e9])
def test_gae_equals_its_definition_whatever_the_padding(definition, gamma, lam, garbage):
    rewards, values, mask = ragged(garbage)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for b, n in enumerate(LENGTHS):
        expected = definition(rewards[b, :n].tolist(), values[b, :n].tolist(), gamma, lam)
        padding = [0.0] * (WIDTH - n)
        assert advantages[b].tolist() == pytest.approx(expected + padding, abs=1e-10)
        gains = [a + v for a, v in zip(expected, values[b, :n].tolist(), strict=True)]
        assert returns[b].tolist() == pytest.approx(gains + padding, abs=1e-10)


def test_with_lambda_one_returns_are_discounted_sums_of_rewards():
    rewards, values, mask = ragged(0.0)
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for b, n in enumerate(LENGTHS):
        row = rewards[b, :n].tolist()
        expected = [math.fsum(0.9**i * r for i, r in enumerate(row[t:])) for t in range(n)]
        assert returns[b, :n].tolist() == pytest.approx(expected, abs=1e-10)


def test_advantages_worked_by_hand():
    # gamma 0.5, lam 0.5. Last token: delta = 4 - 2 = 2. Before it: delta = 1 + 0.5 * 2 - 3 = -1, A = -1 + 0.25 * 2.
    # The row of one token: 5 - 1 = 4. The 7s stand in the padding.
    advantages, returns = gae(
        torch.tensor([[1.0, 4.0, 7.0], [5.0, 7.0, 7.0], [7.0, 7.0, 7.0]]),
        torch.tensor([[3.0, 2.0, 7.0], [1.0, 7.0, 7.0], [7.0, 7.0, 7.0]]),
        torch.tensor([[True, True, False], [True, False, False], [False, False, False]]),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages.tolist() == [[-0.5, 2.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert returns.tolist() == [[2.5, 4.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_no_columns_give_no_advantages():
    empty = torch.zeros(2, 0)
    advantages, returns = gae(empty, empty, empty.bool(), gamma=1.0, lam=0.95)
    assert advantages.shape == returns.shape == (2, 0)


def test_inputs_are_left_as_they_were():
    rewards, values, mask = ragged(3.0)
    copies = rewards.clone(), values.clone(), mask.clone()
    gae(rewards, values, mask, gamma=0.9, lam=0.9)
    assert all(torch.equal(x, copy) for x, copy in zip((rewards, values, mask), copies, strict=True))
