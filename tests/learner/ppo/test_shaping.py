"""KL estimators by exact summation, and rewards by a loop over tokens."""

import math

import pytest
import torch

from common.model.masking import last_places, length_mask
from learner.ppo.shaping import KL_ESTIMATORS, k1, k2, k3, token_rewards

P, Q = [0.1, 0.2, 0.3, 0.4], [0.4, 0.05, 0.35, 0.2]


def expectation(estimator, p, q):
    """Sum over the whole distribution of p times the estimate at each outcome."""
    estimates = estimator(torch.tensor(p, dtype=torch.float64).log(), torch.tensor(q, dtype=torch.float64).log())
    return math.fsum(prob * float(e) for prob, e in zip(p, estimates, strict=True))


def true_kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("estimator", [k1, k3])
@pytest.mark.parametrize(("p", "q"), [(P, Q), (Q, P), (P, P)])
def test_k1_and_k3_are_unbiased_estimates_of_the_kl_from_the_sampler(estimator, p, q):
    assert expectation(estimator, p, q) == pytest.approx(true_kl(p, q), abs=1e-12)


def test_the_bias_of_k2_is_of_third_order():
    def bias(step):
        q = [p + step * d for p, d in zip(P, [4, -1, -1, -2], strict=True)]
        return expectation(k2, P, q) - true_kl(P, q)

    # With u = q / p - 1: x^2 / 2 + x = u - u^3 / 6 + ..., and E[u] = 0, so the bias is -E[u^3] / 6, here -6314 / 6.
    assert bias(1e-4) / 1e-12 == pytest.approx(-6314 / 6, abs=10)


@pytest.mark.parametrize("estimator", [k2, k3])
def test_k2_and_k3_are_never_negative(estimator):
    other = torch.arange(-500, 501) / 100
    estimates = estimator(torch.zeros(1001), other)
    assert (estimates >= 0).all()
    assert float(estimates[500]) == 0.0


def test_estimates_where_the_other_policy_is_twice_as_likely():
    # x = log(0.5 / 0.25) = 0.6931: k1 = -0.6931, k2 = 0.6931^2 / 2 = 0.2402, k3 = 2 - 1 - 0.6931 = 0.3069.
    sampler, other = torch.tensor(0.25).log(), torch.tensor(0.5).log()
    for name, expected in {"k1": -0.6931, "k2": 0.2402, "k3": 0.3069}.items():
        assert float(KL_ESTIMATORS[name](sampler, other)) == pytest.approx(expected, abs=1e-4)


def test_k3_keeps_small_differences_in_float32():
    # exp(x) - 1 - x is x^2 / 2 + x^3 / 6 here: a plain exp(x) - 1 would lose most of it at x = 1e-2.
    assert float(k3(torch.tensor(0.0), torch.tensor(1e-2))) == pytest.approx(5.01671e-5, abs=2e-9)


def test_k3_is_capped_where_the_other_policy_is_likelier():
    # exp(2.6) - 3.6 = 9.86 is below the cap of 10, exp(2.7) - 3.7 = 11.2 is not; exp(-50) + 49 = 49.
    x = torch.tensor([2.6, 2.7, 50.0, 500.0, -50.0, -500.0])
    assert k3(torch.zeros(6), x).tolist() == pytest.approx([9.8637, 10.0, 10.0, 10.0, 49.0, 499.0], abs=1e-4)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e9])
def test_every_token_pays_for_its_kl_and_the_last_one_gets_the_score(garbage):
    lengths, kl_coef = [4, 0, 1, 3], 0.3
    torch.manual_seed(0)
    scores, kl = torch.randn(4), torch.full((4, 5), garbage)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    for b, n in enumerate(lengths):
        mask[b, :n], kl[b, :n] = True, torch.randn(n)
    scores[1] = garbage  # an empty response: no token gets it
    before = kl.clone()
    rewards = token_rewards(scores, kl, mask, kl_coef=kl_coef)
    for b, n in enumerate(lengths):
        expected = [-kl_coef * float(kl[b, t]) for t in range(n)]
        if n:
            expected[-1] += float(scores[b])
        assert rewards[b].tolist() == pytest.approx(expected + [0.0] * (5 - n), abs=1e-6)
    torch.testing.assert_close(kl, before, equal_nan=True, atol=0, rtol=0)


def test_rewards_worked_by_hand():
    # kl_coef 0.5: -0.5 * 2 = -1 and -0.5 * -4 + 10 = 12; one token: -0.5 * 6 + 20 = 17.
    rewards = token_rewards(
        torch.tensor([10.0, 20.0]),
        torch.tensor([[2.0, -4.0], [6.0, 8.0]]),
        torch.tensor([[True, True], [True, False]]),
        kl_coef=0.5,
    )
    assert rewards.tolist() == [[-1.0, 12.0], [17.0, 0.0]]


@pytest.mark.parametrize("row", [[True, False, True], [False, True, True]])
def test_a_mask_with_holes_is_refused_before_a_score_is_lost(row):
    mask = torch.tensor([[True, False, False], row])
    with pytest.raises(ValueError, match="without gaps, but row 1 is False at place"):
        token_rewards(torch.ones(2), torch.zeros(2, 3), mask, kl_coef=0.1)


def test_turn_rewards_stay_on_their_tokens_and_the_last_one_gets_the_rest():
    # kl_coef 0.5. Score 10, of which 3 and -1 were earned on tokens 0 and 2: the last one gets 10 - 2 = 8 more.
    kl = torch.tensor([[2.0, -4.0, 0.0, 6.0], [6.0, 8.0, 8.0, 8.0]])
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    turns = torch.tensor([[3.0, 0.0, -1.0, 0.0], [5.0, 9.0, math.nan, 9.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, mask, kl_coef=0.5, turn_rewards=turns)
    assert rewards.tolist() == [[2.0, 2.0, -1.0, 5.0], [17.0, 0.0, 0.0, 0.0]]
    # Whatever is earned when, the rewards add up to the score less the penalties.
    without = token_rewards(torch.tensor([10.0, 20.0]), kl, mask, kl_coef=0.5)
    assert rewards.sum(1).tolist() == without.sum(1).tolist()


def test_each_sequence_ends_with_the_score_less_what_was_earned_before():
    # kl_coef 0.5. Score 10. Tokens 0, 2 and 3 earned 3, -1 and 2. Sequences end after tokens 2 and 4: token 2 gets 10 -
    # 3 in place of its own, token 4 gets 10 - 3 + 1 - 2.
    kl = torch.tensor([[2.0, -4.0, 0.0, 6.0, 2.0], [6.0, 8.0, 8.0, 8.0, 8.0]])
    mask = torch.tensor([[True] * 5, [True, False, False, False, False]])
    turns = torch.tensor([[3.0, 0.0, -1.0, 2.0, 7.0], [5.0, 9.0, math.nan, 9.0, 9.0]])
    ends = torch.tensor([[False, False, True, False, True], [True, False, False, False, False]])
    scores = torch.tensor([10.0, 20.0])
    rewards = token_rewards(scores, kl, mask, kl_coef=0.5, turn_rewards=turns, ends=ends)
    assert rewards.tolist() == [[2.0, 2.0, 7.0, -1.0, 5.0], [17.0, 0.0, 0.0, 0.0, 0.0]]
    plain = token_rewards(scores, kl, mask, kl_coef=0.5, ends=ends)
    assert plain.tolist() == [[-1.0, 2.0, 10.0, -3.0, 9.0], [17.0, 0.0, 0.0, 0.0, 0.0]]


def test_ends_of_whole_responses_change_no_bit_of_rewards():
    generator = torch.Generator().manual_seed(0)
    scores, kl, turns = torch.randn(4, generator=generator), *torch.randn(2, 4, 6, generator=generator)
    mask = length_mask(torch.tensor([6, 0, 1, 4]), 6)
    for turn_rewards in (None, turns):
        found = [
            token_rewards(scores, kl, mask, kl_coef=0.3, turn_rewards=turn_rewards, ends=ends)
            for ends in (None, last_places(mask))
        ]
        assert found[0].numpy().tobytes() == found[1].numpy().tobytes()
