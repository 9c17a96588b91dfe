"""The preference loss and its gradient against a loop over pairs, finite differences, and numbers worked by hand."""

import math

import pytest
import torch

from learner.reward_model.loss import preference_loss


def scored_pairs(count=6):
    """Scores of both sides, and margins, [count] in float64."""
    torch.manual_seed(2)
    chosen, rejected, margins = 1.5 * torch.randn(3, count, dtype=torch.float64)
    return chosen.requires_grad_(), rejected.requires_grad_(), margins.abs()


def test_the_preference_loss_worked_by_hand():
    # Won by ln 3: p = 3 / 4, loss ln(4 / 3), its slope in the difference -1 / 4. A tie where a lead of ln 3 is asked:
    # p = 1 / 4, loss ln 4, slope -3 / 4. Over 4 pairs, of which these are two: (ln(4 / 3) + ln 4) / 4 = ln(16 / 3) / 4.
    chosen = torch.tensor([2 + math.log(3), -1.0], requires_grad=True)
    rejected = torch.tensor([2.0, -1.0], requires_grad=True)
    margins = torch.tensor([0.0, math.log(3)])
    loss, stats = preference_loss(chosen, rejected, margins, centre_coef=0.0, num_pairs=4)
    loss.backward()
    assert loss.item() == pytest.approx(0.418494, abs=1e-6)
    assert chosen.grad.tolist() == pytest.approx([-1 / 16, -3 / 16], abs=1e-6)
    assert rejected.grad.tolist() == pytest.approx([1 / 16, 3 / 16], abs=1e-6)
    assert float(stats["correct"]) == 1  # a tie is not right
    assert float(stats["margin"]) == pytest.approx(math.log(3), abs=1e-6)


def test_centring_pulls_both_scores_of_a_pair_towards_zero():
    # Both 1, coefficient 0.1: ln 2 + 0.1 * 2^2 = 1.093147; slopes -1 / 2 and 1 / 2, each plus 0.1 * 2 * 2 = 0.4.
    chosen, rejected = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    loss, _ = preference_loss(chosen, rejected, torch.zeros(1), centre_coef=0.1, num_pairs=1)
    loss.backward()
    assert loss.item() == pytest.approx(1.093147, abs=1e-6)
    assert [chosen.grad.item(), rejected.grad.item()] == pytest.approx([-0.1, 0.9], abs=1e-6)


@pytest.mark.parametrize("centre_coef", [0.0, 0.3])
def test_loss_and_gradient_equal_a_loop_over_pairs(centre_coef):
    chosen, rejected, margins = scored_pairs()
    loss, stats = preference_loss(chosen, rejected, margins, centre_coef=centre_coef, num_pairs=11)
    loss.backward()
    total, correct = 0.0, 0
    for i, (c, r, m) in enumerate(zip(chosen.tolist(), rejected.tolist(), margins.tolist())):
        # Bradley and Terry: the side of strength e^(c - m) is preferred to that of e^r in proportion to the strengths.
        preferred = math.exp(c - m) / (math.exp(c - m) + math.exp(r))
        total += math.log(1 / preferred) + centre_coef * (c * c + 2 * c * r + r * r)
        pull = 2 * centre_coef * (c + r)  # d log p / dc = 1 - p
        assert chosen.grad[i].item() == pytest.approx((preferred - 1 + pull) / 11, abs=1e-12)
        assert rejected.grad[i].item() == pytest.approx((1 - preferred + pull) / 11, abs=1e-12)
        correct += c > r
    assert loss.item() == pytest.approx(total / 11, abs=1e-12)
    assert 0 < correct < len(margins)
    assert float(stats["correct"]) == correct
    assert float(stats["margin"]) == pytest.approx(sum(chosen.tolist()) - sum(rejected.tolist()), abs=1e-12)
    assert not any(stat.requires_grad for stat in stats.values())

    def value(side, i, change):
        sides = [chosen.detach().clone(), rejected.detach().clone()]
        sides[side][i] += change
        return preference_loss(*sides, margins, centre_coef=centre_coef, num_pairs=11)[0].item()

    for side, scores in enumerate((chosen, rejected)):
        slopes = [(value(side, i, 1e-5) - value(side, i, -1e-5)) / 2e-5 for i in range(len(margins))]
        assert scores.grad.tolist() == pytest.approx(slopes, abs=1e-9)


def test_large_differences_stay_finite():
    # Right by 1e4: no loss, no slope. Wrong by 1e4: loss 1e4, slope -1 in the difference. Over two pairs: half of it.
    chosen = torch.tensor([5e3, -5e3], requires_grad=True)
    rejected = torch.tensor([-5e3, 5e3], requires_grad=True)
    loss, stats = preference_loss(chosen, rejected, torch.zeros(2), centre_coef=0.01, num_pairs=2)
    loss.backward()
    assert loss.item() == pytest.approx(5e3, abs=1e-3)
    assert chosen.grad.tolist() == pytest.approx([0.0, -0.5], abs=1e-6)
    assert rejected.grad.tolist() == pytest.approx([0.0, 0.5], abs=1e-6)
    assert [float(stats["correct"]), float(stats["margin"])] == [1.0, 0.0]


@pytest.mark.parametrize("groups", [[[3], [0, 1, 2], [4, 5]], [[5, 0], [4, 1, 3, 2]]])
def test_micro_batches_of_pairs_add_up_to_the_whole(groups):
    def summed(groups):
        chosen, rejected, margins = scored_pairs()
        found = {"loss": 0.0, "correct": 0.0, "margin": 0.0}
        for rows in groups:
            loss, stats = preference_loss(chosen[rows], rejected[rows], margins[rows], centre_coef=0.2, num_pairs=6)
            loss.backward()
            for key, value in {"loss": loss, **stats}.items():
                found[key] += value.item()
        return found, torch.stack([chosen.grad, rejected.grad])

    (found, gradient), (whole, expected) = summed(groups), summed([list(range(6))])
    assert found == pytest.approx(whole, abs=1e-12)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)
