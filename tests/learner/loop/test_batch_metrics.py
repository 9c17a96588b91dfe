"""Metrics of a batch, worked by hand."""

from __future__ import annotations

import pytest

from common.experience_table import experience_table
from common.types import Experience, Score
from common.user_code.results import MAX_FIGURES
from learner.loop.batch_metrics import batch_metrics
from tests.fakes import END, make_experience, make_prompt, make_rollout


@pytest.mark.parametrize(
    ("prompts", "scores", "share"),
    [
        ([1, 2, 3], [0.5, 0.5, 0.5], 1.0),  # one response per prompt: the batch counts as one prompt
        ([1, 2, 3], [0.5, 0.5, 0.6], 0.0),
        ([1, 1, 2, 2], [0.1, 0.1, 0.7, 0.7], 1.0),  # equal within each prompt
        ([1, 1, 2, 2, 3, 3, 3], [0.1, 0.1, 0.7, 0.8, 1.0, 1.0, 1.0], 2 / 3),
    ],
)
def test_the_share_of_prompts_with_equal_scores_is_recorded(prompts, scores, share):
    rows = [make_experience(prompt, [5, END], score=score) for prompt, score in zip(prompts, scores)]
    record = batch_metrics(experience_table(rows), 0, policy_version=0)
    assert record["rollout/score/zero_std"] == pytest.approx(share)
    assert (record["rollout/score/std"] == 0.0) == (len(set(scores)) == 1)


def test_figures_of_sources_are_means_over_the_rollouts_that_have_them():
    scores = [
        Score(1.0, {"mean": 1.0, "std": 4.0}, {}, {"mean/std": 2.0, "std/rare": 5.0}),
        Score(3.0, {"mean": 3.0, "std": 8.0}, {}, {"mean/std": 4.0}),
    ]
    rows = [Experience(make_rollout(make_prompt(n), [4, END]), score, None) for n, score in enumerate(scores)]
    record = batch_metrics(experience_table(rows), 0, policy_version=0)
    assert (record["rollout/score/mean"], record["rollout/score/std"]) == (2.0, 1.0)  # of the totals 1 and 3
    own = {key: value for key, value in record.items() if key.startswith("reward/")}
    assert own == {"reward/mean/score": 2.0, "reward/std/score": 6.0, "reward/mean/std": 3.0, "reward/std/rare": 5.0}


def test_the_number_of_figures_of_a_source_is_bounded():
    scores = [Score(1.0, {"s": 1.0}, {}, {f"s/f{n:03d}": 1.0, "t/x": 2.0}) for n in range(MAX_FIGURES + 5)]
    rows = [Experience(make_rollout(make_prompt(n), [4, END]), score, None) for n, score in enumerate(scores)]
    record = batch_metrics(experience_table(rows), 0, policy_version=0)
    assert sum(key.startswith("reward/s/f") for key in record) == MAX_FIGURES
    assert record["reward/t/x"] == 2.0
