"""The targets of a small batch worked by hand, and the loss that is made from them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config.ppo import PPOConfig
from common.experience_table import experience_table
from learner.ppo.experience import ExperienceBatch
from learner.ppo.objective import objective
from learner.ppo.targets import Targets, targets
from learner.ranks.trainer import read_together
from tests.fakes import make_experience

PLAIN = PPOConfig(lam=1.0, whiten_advantages=False, importance_cap=2.0, value_coef=0.5, clip_eps=0.2)


def small_batch() -> ExperienceBatch:
    """Responses of two tokens and of one; every ref_logprob is -2, every rollout_logprob -1.5."""
    rows = [make_experience(0, [5, 6]), make_experience(1, [7])]
    return ExperienceBatch.from_table(
        experience_table(
            [
                replace(
                    row,
                    rollout=replace(row.rollout, rollout_logprobs=np.full(n, -1.5, np.float32)),
                    ref_logprobs=np.full(n, -2.0, np.float32),
                )
                for row, n in zip(rows, (2, 1), strict=True)
            ]
        )
    )


def found_targets(ppo: PPOConfig, **fields: object) -> tuple[Targets, dict[str, float]]:
    fixed, _, stats = targets(
        replace(small_batch(), **fields),
        torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
        torch.tensor([[0.5, 1.0], [2.0, 0.0]]),
        torch.tensor([3.0, -1.0]),
        kl_coef=0.1,
        kl_estimator="k1",
        ppo=ppo,
    )
    return fixed, stats


def test_targets_worked_by_hand():
    # k1 = old - ref: 1, 0 and -1. Rewards -0.1 kl, plus the score at the end: -0.1, 3, 0.1 - 1 = -0.9. With gamma and
    # lambda of 1 returns are 2.9, 3 and -0.9; advantages are returns less values: 2.4, 2 and -2.9.
    # old - rollout: 0.5, -0.5 and -1.5, so weights are e^0.5 = 1.6487, e^-0.5 = 0.6065, e^-1.5 = 0.2231.
    fixed, stats = found_targets(PLAIN)
    assert fixed.returns.flatten().tolist() == pytest.approx([2.9, 3.0, -0.9, 0.0], abs=1e-6)
    assert fixed.advantages.flatten().tolist() == pytest.approx([2.4, 2.0, -2.9, 0.0], abs=1e-6)
    assert fixed.importance.flatten().tolist() == pytest.approx([1.6487, 0.6065, 0.2231, 1.0], abs=1e-4)
    # Means over three tokens, or two responses. Returns: mean 5/3, squares 8.41 + 9 + 0.81 over 3 less 25/9.
    assert stats["kl/per_token"] == pytest.approx(0.0, abs=1e-7)
    assert stats["kl/coef"] == 0.1
    assert stats["value/mean"] == pytest.approx(3.5 / 3, abs=1e-6)
    assert stats["value/returns_var"] == pytest.approx(18.22 / 3 - 25 / 9, abs=1e-6)
    assert stats["value/advantages_var"] == pytest.approx((5.76 + 4 + 8.41) / 3 - 0.25, abs=1e-6)
    # k3 from old to rollout with x = old - rollout: e^x - 1 - x.
    mismatch = sum(math.exp(x) - 1 - x for x in (0.5, -0.5, -1.5)) / 3
    assert stats["mismatch/kl"] == pytest.approx(mismatch, abs=1e-6)
    assert stats["mismatch/capped"] == 0.0


def test_where_the_policy_is_the_reference_the_kl_is_zero():
    fixed, stats = found_targets(PLAIN, ref_is_policy=torch.tensor([True, False]))
    assert fixed.returns[0].tolist() == pytest.approx([3.0, 3.0], abs=1e-6)
    assert stats["kl/per_response"] == pytest.approx(-0.5, abs=1e-6)  # 0 and -1


def test_whitened_advantages_have_mean_zero_and_variance_one():
    fixed, _ = found_targets(PLAIN.model_copy(update={"whiten_advantages": True}))
    tokens = fixed.advantages[fixed.mask]
    assert tokens.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert tokens.var(correction=0).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("difference", [0.0, 1e-3])
def test_the_rounding_of_equal_returns_is_no_variance(difference):
    """Eight responses of six tokens. Without penalties and discount, the return of each token is its response's score.
    Half of the scores are larger by `difference`, so their variance is its half squared."""
    rows = [make_experience(index, [5] * 6) for index in range(8)]
    values = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    batch, scores = ExperienceBatch.from_table(experience_table(rows)), torch.full((8,), 0.3)
    scores[::2] += difference
    no_logprobs = torch.zeros(8, 6)
    fixed, _, stats = targets(batch, no_logprobs, values, scores, kl_coef=0.0, kl_estimator="k1", ppo=PLAIN)
    assert float(fixed.returns.var()) > 0
    assert stats["value/returns_var"] == pytest.approx(difference**2 / 4, rel=1e-3)
    error = float((scores[:, None] - values).double().var(correction=0))
    assert stats["value/advantages_var"] == pytest.approx(error, rel=1e-4)
    explained, ratio = (1 - 4 * error / difference**2, 4 * error / difference**2) if difference else (0.0, 0.0)
    assert stats["value/explained_variance"] == pytest.approx(explained, rel=1e-2)
    assert stats["value/variance_ratio"] == pytest.approx(ratio, rel=1e-2)


def test_without_a_critic_there_are_no_statistics_of_values():
    _, stats = found_targets(PLAIN.model_copy(update={"advantages": "returns"}))
    assert [key for key in stats if key.startswith("value/")] == []


def test_rows_of_targets_are_cut_to_the_longest_chosen_response():
    fixed, _ = found_targets(PLAIN)
    part = fixed.rows(torch.tensor([1]), 1, torch.device("cpu"))
    assert part.advantages.tolist() == [pytest.approx([-2.9], abs=1e-6)]
    assert part.mask.tolist() == [[True]]


def loss_and_gradients(**options) -> tuple[float, list[torch.Tensor | None]]:
    fixed, _ = found_targets(PLAIN.model_copy(update={"importance_cap": 0.0}))
    leaves = [x.clone().requires_grad_() for x in (fixed.base_logprobs, torch.ones(2, 2), fixed.old_values)]
    loss, _ = objective(*leaves, fixed, ppo=PLAIN.model_copy(update={"entropy_coef": 0.1}), num_tokens=3, **options)
    loss.backward()
    return loss.item(), [leaf.grad for leaf in leaves]


def test_the_loss_worked_by_hand():
    # Ratios are 1: policy loss -(2.4 + 2 - 2.9) / 3 = -0.5. Value loss (2.4^2 + 2^2 + 2.9^2) / 2 / 3 = 18.17 / 6.
    # Entropy 1. In all -0.5 + 0.5 * 18.17 / 6 - 0.1.
    loss, _ = loss_and_gradients()
    assert loss == pytest.approx(-0.5 + 18.17 / 12 - 0.1, abs=1e-6)


def test_the_critic_alone_has_no_gradient_in_the_policy():
    loss, (logprobs, entropy, values) = loss_and_gradients(critic_only=True)
    assert loss == pytest.approx(18.17 / 12, abs=1e-6)
    assert logprobs is entropy is None
    assert values.flatten().tolist() == pytest.approx([-0.4, -2 / 6, 2.9 / 6, 0.0], abs=1e-6)


def test_the_sums_of_micro_batches_are_read_with_their_counts():
    parts = [
        (3, {"a": torch.tensor(1.5), "b": torch.tensor(2.0)}),
        (0, {"a": torch.tensor(0.0), "b": torch.tensor(4.0)}),
    ]
    assert read_together(parts) == [(3, {"a": 1.5, "b": 2.0}), (0, {"a": 0.0, "b": 4.0})]
