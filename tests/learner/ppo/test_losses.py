"""Losses and their gradients against loops over the tokens that count, and numbers worked by hand."""

import math
import typing

import pytest
import torch

from common.config.ppo import PPOConfig
from learner.ppo.losses import POLICY_LOSSES, entropy_bonus, policy_loss, value_loss
from learner.ppo.mismatch import importance_weights

LENGTHS, WIDTH, NUM_TOKENS = [4, 0, 1, 6], 7, 23  # 23: this is one micro-batch of a larger minibatch
TOKENS = [(b, t) for b, n in enumerate(LENGTHS) for t in range(n)]
MASK = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
GARBAGE = [math.nan, math.inf, 1e9]


def ragged(count, garbage, *, scale=1.0):
    """`count` tensors [B, R] in float64 with garbage in the padding."""
    torch.manual_seed(1)
    return list(torch.where(MASK, scale * torch.randn(count, *MASK.shape, dtype=torch.float64), garbage))


def check_gradient(grad, expected):
    """`expected` by token; zero in the padding."""
    by_place = [[expected.get((b, t), 0.0) for t in range(WIDTH)] for b in range(len(LENGTHS))]
    torch.testing.assert_close(grad, torch.tensor(by_place, dtype=grad.dtype), atol=1e-10, rtol=0)


CLIP, MASKED = POLICY_LOSSES["clip"], POLICY_LOSSES["mask"]
BOUNDS = 0.8, 1.3


def clip_stops(a, ratio):
    """An increase of a good token's probability beyond 1.3, or a fall of a bad one's below 0.8, earns nothing more."""
    return (a > 0 and ratio > 1.3) or (a < 0 and ratio < 0.8)


def mask_stops(a, ratio):
    return not 0.8 <= ratio <= 1.3


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rule", "stops"), [(CLIP, clip_stops), (MASKED, mask_stops)], ids=POLICY_LOSSES)
def test_a_policy_loss_and_its_gradient_equal_a_loop_over_tokens(garbage, weighted, rule, stops):
    logprobs, old_logprobs, advantages, weights = ragged(4, garbage, scale=0.5)
    weights = weights.abs() if weighted else None
    logprobs.requires_grad_()
    loss, stats = policy_loss(
        logprobs, old_logprobs, advantages, MASK, rule=rule, bounds=BOUNDS, num_tokens=NUM_TOKENS, weights=weights
    )
    loss.backward()
    total, dropped, approx_kl, ratios, gradient = 0.0, 0, 0.0, 0.0, {}
    for b, t in TOKENS:
        new, old, a = logprobs[b, t].item(), float(old_logprobs[b, t]), float(advantages[b, t])
        w = float(weights[b, t]) if weighted else 1.0
        ratio = math.exp(new) / math.exp(old)
        stop = stops(a, ratio)
        if rule is CLIP:
            total -= w * a * ((1.3 if a > 0 else 0.8) if stop else ratio)
        elif not stop:
            total -= w * a * ratio
        gradient[b, t] = 0.0 if stop else -a * ratio * w / NUM_TOKENS
        dropped += stop
        ratios += ratio
        approx_kl += ratio - 1 - math.log(ratio)
    assert 0 < dropped < len(TOKENS)
    assert loss.item() == pytest.approx(total / NUM_TOKENS, abs=1e-10)
    check_gradient(logprobs.grad, gradient)
    assert float(stats["dropped"]) == dropped
    assert float(stats["approx_kl"]) == pytest.approx(approx_kl, abs=1e-10)
    assert float(stats["ratio"]) == pytest.approx(ratios, abs=1e-10)
    assert not any(stat.requires_grad for stat in stats.values())


def test_the_table_of_policy_losses_has_every_name_of_the_setting():
    assert set(POLICY_LOSSES) == set(typing.get_args(PPOConfig.model_fields["policy_loss"].annotation))


def test_the_masked_loss_worked_by_hand():
    # Bounds 0.8 and 1.3. Ratios 1.5 and 0.5 are out, whatever the advantage. A = 2, ratio 1.25: gradient -2.5 / 4.
    # A = -1, ratio 0.8: on the bound, gradient 0.8 / 4. Losses -2.5 and 0.8: -1.7, over 4: -0.425.
    ratios = torch.tensor([[1.5, 1.25, 0.5, 0.8]], dtype=torch.float64)
    logprobs = ratios.log().requires_grad_()
    advantages, mask = torch.tensor([[-2.0, 2.0, 1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)
    bounds = 0.8 - 1e-12, 1.3
    loss, stats = policy_loss(logprobs, 0 * ratios, advantages, mask, rule=MASKED, bounds=bounds, num_tokens=4)
    loss.backward()
    assert loss.item() == pytest.approx(-0.425, abs=1e-9)
    assert logprobs.grad[0].tolist() == pytest.approx([0.0, -0.625, 0.0, 0.2], abs=1e-9)
    assert float(stats["dropped"]) == 2


def test_a_ratio_on_a_bound_of_the_mask_keeps_its_gradient():
    ratio = torch.tensor([0.5, 1.5, 0.4999, 1.5001])
    assert MASKED(ratio, torch.ones(4), bounds=(0.5, 1.5))[1].tolist() == [False, False, True, True]


def test_the_clipped_loss_worked_by_hand():
    # eps 0.2. A = 2, ratio 1.5: kept at 1.2, -2.4, no gradient. A = -2, ratio 1.5: 3, gradient 3 / 4.
    # A = 1, ratio 0.5: -0.5, gradient -0.5 / 4. A = -1, ratio 0.5: kept at 0.8, 0.8. Sum 0.9, over 4: 0.225.
    logprobs = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
    advantages, mask = torch.tensor([[2.0, -2.0, 1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)
    loss, stats = policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, rule=CLIP, bounds=(0.8, 1.2), num_tokens=4)
    loss.backward()
    assert loss.item() == pytest.approx(0.225, abs=1e-6)
    assert logprobs.grad[0].tolist() == pytest.approx([0.0, 0.75, -0.125, 0.0], abs=1e-6)
    assert float(stats["dropped"]) == 2
    assert float(stats["ratio"]) == pytest.approx(4.0, abs=1e-6)


@pytest.mark.parametrize("rule", POLICY_LOSSES.values(), ids=POLICY_LOSSES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("difference", [100.0, -100.0, 1e4, -1e4])
def test_a_log_ratio_of_any_size_has_a_finite_loss_and_gradient(difference, advantage, rule):
    # exp(100) is inf in float32. The clip removes the gradient where the ratio moved as far as the advantage wants; in
    # the other direction it is bounded by exp(20). The mask removes it in both.
    logprobs = torch.full((1, 1), difference, requires_grad=True)
    ones = torch.ones(1, 1)
    loss, stats = policy_loss(logprobs, 0 * ones, advantage * ones, ones.bool(), rule=rule, bounds=BOUNDS, num_tokens=1)
    loss.backward()
    assert math.isfinite(loss.item())
    assert math.isfinite(logprobs.grad.item())
    assert logprobs.grad.item() == 0 or (rule is CLIP and difference * advantage < 0)
    assert all(math.isfinite(stat) for stat in stats.values())


@pytest.mark.parametrize("rule", POLICY_LOSSES.values(), ids=POLICY_LOSSES)
def test_before_the_first_update_the_gradient_is_the_policy_gradient(rule):
    (advantages,) = ragged(1, math.nan)
    logprobs = torch.full(MASK.shape, -2.0, dtype=torch.float64, requires_grad=True)
    loss, stats = policy_loss(
        logprobs, logprobs.detach(), advantages, MASK, rule=rule, bounds=BOUNDS, num_tokens=NUM_TOKENS
    )
    loss.backward()
    check_gradient(logprobs.grad, {(b, t): -float(advantages[b, t]) / NUM_TOKENS for b, t in TOKENS})
    assert float(stats["dropped"]) == float(stats["approx_kl"]) == 0.0


@pytest.mark.parametrize("value_clip", [0, 0.3])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_the_value_loss_and_its_gradient_equal_a_loop_over_tokens(value_clip, garbage):
    values, old_values, returns = ragged(3, garbage)
    values.requires_grad_()
    loss, stats = value_loss(values, old_values, returns, MASK, value_clip=value_clip, num_tokens=NUM_TOKENS)
    loss.backward()
    total, clipped, gradient = 0.0, 0, {}
    for b, t in TOKENS:
        v, old, target = values[b, t].item(), float(old_values[b, t]), float(returns[b, t])
        # Clipping bites where the value went too far and its kept-back neighbour is further from the return.
        near = min(max(v, old - value_clip), old + value_clip) if value_clip else v
        stop = abs(near - target) > abs(v - target)
        total += ((near if stop else v) - target) ** 2 / 2
        gradient[b, t] = 0.0 if stop else (v - target) / NUM_TOKENS
        clipped += stop
    assert (clipped > 0) == (value_clip > 0)
    assert loss.item() == pytest.approx(total / NUM_TOKENS, abs=1e-10)
    check_gradient(torch.where(MASK, values.grad, 0.0), gradient)
    assert float(stats["clipped"]) == clipped
    assert not stats["clipped"].requires_grad


@pytest.mark.parametrize("value_clip", [0, 0.3])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_values_in_the_padding_get_no_gradient(value_clip, garbage):
    values, old_values, returns = ragged(3, garbage)
    values.requires_grad_()
    value_loss(values, old_values, returns, MASK, value_clip=value_clip, num_tokens=NUM_TOKENS)[0].backward()
    assert values.grad[~MASK].tolist() == [0.0] * int((~MASK).sum())


def test_the_value_loss_worked_by_hand():
    # Old 0, clip 0.2, value 1. Return 2: kept at 0.2, error 1.8^2 = 3.24 > 1, no gradient.
    # Return 0.1: 0.9^2 = 0.81 > 0.1^2, gradient 0.9 / 2. Loss (3.24 + 0.81) / 2 / 2 = 1.0125.
    values, mask = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, dtype=torch.bool)
    loss, stats = value_loss(values, torch.zeros(1, 2), torch.tensor([[2.0, 0.1]]), mask, value_clip=0.2, num_tokens=2)
    loss.backward()
    assert loss.item() == pytest.approx(1.0125, abs=1e-6)
    assert values.grad[0].tolist() == pytest.approx([0.0, 0.45], abs=1e-6)
    assert float(stats["clipped"]) == 1


def test_no_value_inside_the_clip_counts_as_clipped():
    # In float32 old + (V - old) is not V for most of these, so an error beyond it would be an error of rounding.
    torch.manual_seed(2)
    values, old_values, returns = torch.randn(3, 1, 4096)
    mask = torch.ones(1, 4096, dtype=torch.bool)
    assert (old_values + (values - old_values) != values).sum() > 100
    _, stats = value_loss(values, old_values, returns, mask, value_clip=20, num_tokens=4096)
    assert float(stats["clipped"]) == 0


@pytest.mark.parametrize("garbage", GARBAGE)
def test_the_entropy_bonus_and_its_gradient_count_each_token_once(garbage):
    (entropy,) = ragged(1, garbage)
    entropy.requires_grad_()
    bonus = entropy_bonus(entropy, MASK, num_tokens=NUM_TOKENS)
    bonus.backward()
    assert bonus.item() == pytest.approx(math.fsum(entropy[p].item() for p in TOKENS) / NUM_TOKENS, abs=1e-10)
    check_gradient(entropy.grad, dict.fromkeys(TOKENS, 1 / NUM_TOKENS))


@pytest.mark.parametrize("rule", POLICY_LOSSES.values(), ids=POLICY_LOSSES)
@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[3], [0, 1, 2]], [[1], [2], [0], [3]]])
def test_micro_batches_do_not_change_the_gradient(groups, rule):
    """One trainable shift of all log-probabilities, values and entropies; each group cut to its longest row."""
    logprobs, old_logprobs, advantages, values, old_values, returns = ragged(6, 0.0)

    def gradients(groups):
        shift = torch.zeros(3, len(LENGTHS), 1, dtype=torch.float64, requires_grad=True)
        for rows in groups:
            cut = rows, slice(max(LENGTHS[b] for b in rows))
            mask = MASK[cut]
            moved, old = (logprobs + shift[0])[cut], old_logprobs[cut]
            p_loss, _ = policy_loss(moved, old, advantages[cut], mask, rule=rule, bounds=BOUNDS, num_tokens=11)
            v_loss, _ = value_loss(
                (values + shift[1])[cut], old_values[cut], returns[cut], mask, value_clip=0.3, num_tokens=11
            )
            bonus = entropy_bonus((values**2 + shift[2])[cut], mask, num_tokens=11)
            (p_loss + v_loss - 0.01 * bonus).backward()
        return shift.grad

    torch.testing.assert_close(gradients(groups), gradients([[0, 1, 2, 3]]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("cap", [1.0, 1.5, math.inf])
def test_importance_weights_are_capped_ratios_and_one_in_the_padding(garbage, cap):
    old_logprobs, rollout_logprobs = ragged(2, garbage)
    weights, stats = importance_weights(old_logprobs, rollout_logprobs, MASK, cap=cap)
    capped, mismatch = 0, 0.0
    for b in range(len(LENGTHS)):
        for t in range(WIDTH):
            if t >= LENGTHS[b]:
                assert float(weights[b, t]) == 1.0
                continue
            ratio = math.exp(float(old_logprobs[b, t])) / math.exp(float(rollout_logprobs[b, t]))
            assert float(weights[b, t]) == pytest.approx(min(ratio, cap), abs=1e-10)
            capped += ratio > cap
            # KL(rollout || old), since the generator is the sampler; at most 10 of a token.
            mismatch += min(ratio - 1 - math.log(ratio), 10)
    assert (capped > 0) == (cap < math.inf)
    assert float(stats["capped"]) == capped
    assert float(stats["mismatch_kl"]) == pytest.approx(mismatch, abs=1e-10)


def test_importance_weights_worked_by_hand():
    # pi_old / pi_rollout = 3 and 1/2, cap 2: weights 2 and 0.5; k3: (3 - 1 - ln 3) + (0.5 - 1 + ln 2) = 1.0945.
    old_logprobs = torch.tensor([[math.log(0.6), math.log(0.2)]])
    rollout_logprobs = torch.tensor([[math.log(0.2), math.log(0.4)]])
    weights, stats = importance_weights(old_logprobs, rollout_logprobs, torch.ones(1, 2, dtype=torch.bool), cap=2.0)
    assert weights[0].tolist() == pytest.approx([2.0, 0.5], abs=1e-6)
    assert float(stats["capped"]) == 1
    assert float(stats["mismatch_kl"]) == pytest.approx(1.0945, abs=1e-4)


def test_a_weight_under_a_cap_below_one_leaves_the_padding_at_one():
    zeros = torch.zeros(1, 2)
    weights, _ = importance_weights(zeros, zeros, torch.tensor([[True, False]]), cap=0.5)
    assert weights.tolist() == [[0.5, 1.0]]


def test_importance_weights_carry_no_gradient():
    old_logprobs, rollout_logprobs = ragged(2, 0.0)
    weights, stats = importance_weights(old_logprobs.requires_grad_(), rollout_logprobs, MASK, cap=2.0)
    assert not weights.requires_grad
    assert not any(stat.requires_grad for stat in stats.values())
