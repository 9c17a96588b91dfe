"""Each advantage estimator against its definition, in Python floats, on unpadded rows."""

import math
import typing

import numpy as np
import pytest
import torch

from common.config.ppo import PPOConfig
from common.model.masking import last_places, length_mask
from learner.ppo.advantages import ADVANTAGES, gae, length_lambdas, returns_to_go
from learner.ppo.critic_quality import realised_returns
from learner.ppo.leave_one_out import leave_one_out

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


@pytest.mark.parametrize("definition", [sum_of_deltas, average_of_n_step_advantages])
@pytest.mark.parametrize("value_lam", [1.0, 0.3, [0.5, 0.0, 1.0, 0.25, 0.9]])
def test_two_lambdas_give_each_response_what_each_gives_alone(definition, value_lam):
    """Advantages with the lambdas of each response; returns with lambdas of their own."""
    rewards, values, mask = ragged(math.nan)
    lams = [0.9, 0.1, 0.7, 0.2, 1.0]

    def on_tokens(numbers):
        return torch.tensor(numbers, dtype=torch.float64)[:, None].expand(-1, WIDTH)

    of_values, lam = on_tokens(value_lam) if isinstance(value_lam, list) else value_lam, on_tokens(lams)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=lam, value_lam=of_values)
    for b, n in enumerate(LENGTHS):
        row, critic, padding = rewards[b, :n].tolist(), values[b, :n].tolist(), [0.0] * (WIDTH - n)
        own = value_lam[b] if isinstance(value_lam, list) else value_lam
        assert advantages[b].tolist() == pytest.approx(definition(row, critic, 0.9, lams[b]) + padding, abs=1e-10)
        gains = [a + v for a, v in zip(definition(row, critic, 0.9, own), critic, strict=True)]
        assert returns[b].tolist() == pytest.approx(gains + padding, abs=1e-10)


def test_the_same_lambda_for_both_gives_the_same_bits_as_one():
    rewards, values, mask = (x.float() if x.is_floating_point() else x for x in ragged(0.0))
    once, twice = (gae(rewards, values, mask, gamma=0.99, lam=0.95, value_lam=lam) for lam in (None, 0.95))
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


def test_a_lambda_grows_with_the_length_of_its_sequence():
    # alpha 0.05: 1 - 20 / length, and 0 up to 20 tokens. An empty response has no error to weigh.
    lengths = [0, 1, 20, 25, 40, 200, 2000]
    mask = length_mask(torch.tensor(lengths), 2000)
    ends = last_places(mask)
    first = length_lambdas(mask, ends, alpha=0.05)[:, 0]
    assert first.tolist() == pytest.approx([0, 0, 0, 0.2, 0.5, 0.9, 0.99], abs=1e-6)
    assert length_lambdas(mask, ends, alpha=2.0)[:3, 0].tolist() == pytest.approx([0, 0.5, 0.975], abs=1e-6)
    ends[5, 159] = True  # its 200 tokens are sequences of 160 and of 40
    found = length_lambdas(mask, ends, alpha=0.05)[5]
    assert found.tolist() == pytest.approx([1 - 20 / 160] * 160 + [0.5] * 40 + [0.0] * 1800, abs=1e-6)


def test_with_lambda_one_returns_are_discounted_sums_of_rewards():
    rewards, values, mask = ragged(0.0)
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for b, n in enumerate(LENGTHS):
        row = rewards[b, :n].tolist()
        expected = [math.fsum(0.9**i * r for i, r in enumerate(row[t:])) for t in range(n)]
        assert returns[b, :n].tolist() == pytest.approx(expected, abs=1e-10)


def test_advantages_worked_by_hand():
    # gamma 0.5, lam 0.5. Last token: delta = 4 - 2 = 2. Before it: delta = 1 + 0.5 * 2 - 3 = -1, A = -1 + 0.25 * 2.
    # The row of one token: 5 - 1 = 4. The 7s are padding.
    advantages, returns = gae(
        torch.tensor([[1.0, 4.0, 7.0], [5.0, 7.0, 7.0], [7.0, 7.0, 7.0]]),
        torch.tensor([[3.0, 2.0, 7.0], [1.0, 7.0, 7.0], [7.0, 7.0, 7.0]]),
        torch.tensor([[True, True, False], [True, False, False], [False, False, False]]),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages.tolist() == [[-0.5, 2.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert returns.tolist() == [[2.5, 4.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_no_columns_give_no_advantages(name):
    empty = torch.zeros(2, 0)
    advantages, returns = ADVANTAGES[name](
        empty, empty, empty.bool(), groups=torch.zeros(2, dtype=torch.int64), gamma=1.0, lam=0.95, value_lam=1.0
    )
    assert advantages.shape == returns.shape == (2, 0)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_inputs_are_not_changed(name):
    rewards, values, mask = ragged(3.0)
    copies = rewards.clone(), values.clone(), mask.clone()
    ADVANTAGES[name](rewards, values, mask, groups=torch.zeros(len(LENGTHS)), gamma=0.9, lam=0.9, value_lam=1.0)
    assert all(torch.equal(x, copy) for x, copy in zip((rewards, values, mask), copies, strict=True))


# RLOO: the mean of the group's other responses as baseline

GROUPS = [7, 3, 7, 3, 7]  # of the rows of LENGTHS; the second row is empty, so the fourth is alone


def mean_of_the_others(totals, i):
    """The definition: R_i minus the mean of R_j over the other written responses j of its group."""
    others = [totals[j] for j in range(len(totals)) if j != i and GROUPS[j] == GROUPS[i] and LENGTHS[j]]
    return totals[i] - math.fsum(others) / len(others) if others else 0.0


def scaled_distance_from_the_group_mean(totals, i):
    """The same by another road: n / (n - 1) times the distance from the mean of the whole group of n."""
    group = [totals[j] for j in range(len(totals)) if GROUPS[j] == GROUPS[i] and LENGTHS[j]]
    n = len(group)
    return n / (n - 1) * (totals[i] - math.fsum(group) / n) if n > 1 else 0.0


@pytest.mark.parametrize("definition", [mean_of_the_others, scaled_distance_from_the_group_mean])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e9])
def test_leave_one_out_equals_its_definition_whatever_the_padding(definition, garbage):
    rewards, values, mask = ragged(garbage)
    advantages, returns = leave_one_out(rewards, values, mask, groups=torch.tensor(GROUPS))
    totals = [math.fsum(rewards[b, :n].tolist()) for b, n in enumerate(LENGTHS)]
    for b, n in enumerate(LENGTHS):
        padding = [0.0] * (WIDTH - n)
        assert advantages[b].tolist() == pytest.approx([definition(totals, b)] * n + padding, abs=1e-10)
        assert returns[b].tolist() == pytest.approx([totals[b]] * n + padding, abs=1e-10)


def test_leave_one_out_worked_by_hand():
    # Totals of the first group: 1, 4, 3. Baselines 3.5, 2, 2.5, so the advantages are -2.5, 2, 0.5. The other group
    # lost its second response, so the one that is left has nothing to compare with. Padding holds 9s.
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    advantages, _ = leave_one_out(
        torch.tensor([[-0.5, 1.5], [4.0, 9.0], [2.0, 1.0], [5.0, 5.0]]),
        torch.full((4, 2), 9.0),
        mask,
        groups=torch.tensor([6, 6, 6, 8]),
    )
    assert advantages.tolist() == [[-2.5, -2.5], [2.0, 0.0], [0.5, 0.5], [0.0, 0.0]]


def test_leave_one_out_keeps_small_differences_of_large_rewards():
    # Float32 sums of three rewards near 1e6 are exact to 0.25 only, and the baselines come from such sums.
    rewards = torch.tensor([[1e6 + 0.125], [1e6], [1e6 - 0.125]])
    advantages, _ = leave_one_out(rewards, rewards, rewards.bool(), groups=torch.zeros(3, dtype=torch.int64))
    assert advantages.flatten().tolist() == [0.1875, 0.0, -0.1875]


def test_the_order_of_rows_does_not_matter_to_groups():
    rewards, values, mask = ragged(0.0)
    groups, order = torch.tensor(GROUPS), torch.tensor([3, 0, 4, 1, 2])
    plain, _ = leave_one_out(rewards, values, mask, groups=groups)
    shuffled, _ = leave_one_out(rewards[order], values[order], mask[order], groups=groups[order])
    assert torch.allclose(shuffled, plain[order], atol=1e-12, rtol=0)


# No baseline


def sum_from_here_on(rewards, gamma):
    return [math.fsum(gamma**i * r for i, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def polynomial_of_gamma(rewards, gamma):
    """Horner's rule on the rewards from the last to the first."""
    result, value = [], 0.0
    for reward in reversed(rewards):
        value = reward + gamma * value
        result.append(value)
    return result[::-1]


@pytest.mark.parametrize("definition", [sum_from_here_on, polynomial_of_gamma])
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e9])
def test_returns_to_go_equal_their_definition_whatever_the_padding(definition, gamma, garbage):
    rewards, values, mask = ragged(garbage)
    advantages, returns = returns_to_go(rewards, values, mask, gamma=gamma)
    for b, n in enumerate(LENGTHS):
        expected = definition(rewards[b, :n].tolist(), gamma) + [0.0] * (WIDTH - n)
        assert advantages[b].tolist() == pytest.approx(expected, abs=1e-10)
        assert torch.equal(returns, advantages)


def test_returns_to_go_worked_by_hand():
    # gamma 0.5: 4; 2 + 0.5 * 4 = 4; 1 + 0.5 * 4 = 3. The 7s are padding.
    rewards = torch.tensor([[1.0, 2.0, 4.0], [5.0, 7.0, 7.0]])
    advantages, _ = returns_to_go(rewards, rewards, torch.tensor([[True] * 3, [True, False, False]]), gamma=0.5)
    assert advantages.tolist() == [[3.0, 4.0, 4.0], [5.0, 0.0, 0.0]]


# The table


def test_the_table_has_every_name_of_the_setting():
    assert set(ADVANTAGES) == set(typing.get_args(PPOConfig.model_fields["advantages"].annotation))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_only_estimators_with_a_critic_read_values_and_lambdas(name):
    rewards, values, mask = ragged(0.0)
    changes = [(values, 0.8, 0.8), (torch.zeros_like(values), 0.8, 0.8), (values, 0.5, 0.8), (values, 0.8, 0.5)]
    plain, *others = (
        ADVANTAGES[name](rewards, given, mask, groups=torch.tensor(GROUPS), gamma=0.9, lam=lam, value_lam=value_lam)
        for given, lam, value_lam in changes
    )
    same = [tuple(torch.equal(x, y) for x, y in zip(other, plain, strict=True)) for other in others]
    critic = [(False, False), (False, True), (True, False)]  # of advantages and returns
    assert same == (critic if PPOConfig(advantages=name).has_critic else [(True, True)] * 3)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize(
    ("row", "place", "found"),
    [([True, False, True], 1, False), ([False, True, True], 0, False), ([False, False, True], 0, False)],
)
def test_a_mask_with_holes_is_refused(name, row, place, found):
    mask = torch.tensor([[True, True, False], row])
    with pytest.raises(ValueError, match=rf"without gaps, but row 1 is {found} at place {place}; put the tokens"):
        ADVANTAGES[name](*torch.ones(2, 2, 3), mask, groups=torch.zeros(2), gamma=1.0, lam=1.0, value_lam=None)


# Responses of several sequences


def slow_gae(rewards, values, ends, gamma, lam):
    """Token by token, each sequence by itself: A_t = r_t + gamma V_(t+1) - V_t + gamma lam A_(t+1)."""

    def advantage(t):
        if ends[t] or t == len(rewards) - 1:
            return rewards[t] - values[t]
        return rewards[t] + gamma * values[t + 1] - values[t] + gamma * lam * advantage(t + 1)

    return [advantage(t) for t in range(len(rewards))]


def some_ends(mask, *, chance=0.3):
    """Random ends, and the last token of each response."""
    generator = torch.Generator().manual_seed(3)
    return (torch.rand(mask.shape, generator=generator) < chance) & mask | last_places(mask)


@pytest.mark.parametrize(("gamma", "lam", "value_lam"), [(1.0, 0.95, None), (0.9, 0.8, 0.5), (0.7, 0.0, 1.0)])
def test_gae_does_not_step_past_the_end_of_a_sequence(gamma, lam, value_lam):
    rewards, values, mask = ragged(math.nan)
    ends = some_ends(mask)
    assert int(ends.sum()) > len(LENGTHS)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, value_lam=value_lam, ends=ends)
    for b, n in enumerate(LENGTHS):
        row = rewards[b, :n].tolist(), values[b, :n].tolist(), ends[b, :n].tolist()
        assert advantages[b, :n].tolist() == pytest.approx(slow_gae(*row, gamma, lam), abs=1e-10)
        gains = slow_gae(*row, gamma, lam if value_lam is None else value_lam)
        assert returns[b, :n].tolist() == pytest.approx([g + v for g, v in zip(gains, row[1])], abs=1e-10)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_ends_of_whole_responses_alone_change_no_bit(name):
    rewards, values, mask = (x.float() if x.is_floating_point() else x for x in ragged(1e9))
    groups = torch.arange(len(mask)) // 2
    about = {"groups": groups, "gamma": 0.97, "lam": 0.9, "value_lam": 0.8}
    plain, given = (ADVANTAGES[name](rewards, values, mask, **about, ends=x) for x in (None, last_places(mask)))
    for one, other in zip(plain, given, strict=True):
        assert torch.equal(one, other)
    ends = some_ends(mask)
    ends[1:4] = last_places(mask)[1:4]
    assert int(ends.sum()) > int(last_places(mask).sum())
    several = ADVANTAGES[name](rewards, values, mask, **about, ends=ends)
    for one, other in zip(plain, several, strict=True):
        assert torch.equal(one[2:4], other[2:4])  # nor do the ends of other rows and groups


def test_each_sequence_is_compared_with_the_mean_of_the_other_responses():
    # Response 0 has sequences of 1 and 5 = 2 + 3, response 1 one of 10, response 2 of 4 and 8: a mean of 6.
    rewards = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0], [4.0, 8.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    ends = torch.tensor([[True, False, True], [True, False, False], [True, True, False]])
    advantages, returns = leave_one_out(rewards, rewards, mask, groups=torch.zeros(3), ends=ends)
    assert returns.tolist() == [[1.0, 5.0, 5.0], [10.0, 0.0, 0.0], [4.0, 8.0, 0.0]]
    of_0, of_1, of_2 = (10 + 6) / 2, (3 + 6) / 2, (3 + 10) / 2
    assert advantages.tolist() == [
        [1 - of_0, 5 - of_0, 5 - of_0],
        [10 - of_1, 0.0, 0.0],
        [4 - of_2, 8 - of_2, 0.0],
    ]


def test_realised_returns_of_files_are_those_of_padded_tensors():
    rewards, _, mask = ragged(0.0)
    ends = some_ends(mask)
    _, expected = returns_to_go(rewards, rewards, mask, gamma=0.9, ends=ends)
    found = realised_returns(rewards[mask].numpy(), ends[mask].numpy(), np.array(LENGTHS), gamma=0.9)
    assert found == pytest.approx(expected[mask].numpy(), abs=1e-12)
