"""A table of experience as tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from common.experience_table import experience_table
from common.types import Experience, SampleId, Turn
from learner.ppo.experience import ExperienceBatch
from tests.fakes import make_experience


def experience(index: int, length: int, ref_logprobs: list[float] | None) -> Experience:
    """Prompts have 2, 3 and 4 tokens in turn; rollout_logprobs are -1, -2, ..., the score 10 * index."""
    made = make_experience(index, list(range(10, 10 + length)), score=10.0 * index)
    sampled = -np.arange(1, length + 1, dtype=np.float32)
    ref = None if ref_logprobs is None else np.array(ref_logprobs, dtype=np.float32)
    return replace(made, rollout=replace(made.rollout, rollout_logprobs=sampled), ref_logprobs=ref)


ROWS = [experience(0, 2, None), experience(1, 3, [-5, -6, -7]), experience(2, 0, []), experience(3, 1, [-8])]


def check(batch: ExperienceBatch) -> None:
    assert batch.sequences.input_ids.tolist() == [3, 4, 10, 11, 3, 4, 5, 10, 11, 12, 3, 4, 5, 6, 3, 4, 10]
    assert batch.sequences.prompt_lengths.tolist() == [2, 3, 4, 2]
    assert batch.sequences.lengths.tolist() == [4, 6, 4, 3]
    assert batch.mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert batch.rollout_logprobs.tolist() == [[-1, -2, 0], [-1, -2, -3], [0, 0, 0], [-1, 0, 0]]
    assert batch.ref_logprobs.tolist() == [[0, 0, 0], [-5, -6, -7], [0, 0, 0], [-8, 0, 0]]
    assert batch.ref_is_policy.tolist() == [True, False, False, False]
    assert batch.scores.tolist() == [0, 10, 20, 30]
    assert len(set(batch.groups.tolist())) == 4  # each row is of a prompt of its own
    assert (batch.rollout_logprobs.dtype, batch.ref_logprobs.dtype) == (torch.float32, torch.float32)
    assert batch.scores.dtype == torch.float64


def test_rows_keep_the_tables_order_with_zeros_in_the_padding():
    check(ExperienceBatch.from_table(experience_table(ROWS)))


def test_chunks_and_slices_of_a_table_give_the_same_batch():
    check(ExperienceBatch.from_table(pa.concat_tables([experience_table(ROWS[:2]), experience_table(ROWS[2:])])))
    more = experience_table([experience(5, 4, None), *ROWS, experience(6, 2, [-1, -1])])
    check(ExperienceBatch.from_table(more.slice(1, 4)))


@pytest.mark.parametrize("known", [0, 4])
def test_all_or_no_rows_may_lack_ref_logprobs(known):
    rows = [experience(i, 2, [-5, -6] if i < known else None) for i in range(4)]
    batch = ExperienceBatch.from_table(experience_table(rows))
    assert batch.ref_is_policy.tolist() == [i >= known for i in range(4)]
    assert batch.ref_logprobs.tolist() == [[-5, -6] if i < known else [0, 0] for i in range(4)]


def test_groups_are_the_responses_to_one_prompt_in_one_epoch():
    last = 2**31 - 1
    ids = [SampleId(0, 0, 0), SampleId(0, last, 0), SampleId(0, 0, 1), SampleId(1, 0, 0), SampleId(1, last, 0)]
    made = [experience(index, 1, [-5]) for index in range(5)]
    rows = [
        replace(row, rollout=replace(row.rollout, prompt=replace(row.rollout.prompt, sample_id=sample_id)))
        for row, sample_id in zip(made, ids, strict=True)
    ]
    groups = ExperienceBatch.from_table(experience_table(rows)).groups.tolist()
    assert groups[0] == groups[2]
    assert len(set(groups)) == 4


def episode(index: int, response: list[int], turns: list[Turn]) -> Experience:
    """An episode whose log-probabilities are -1, -2, ... on the tokens that the policy sampled."""
    made = make_experience(index, response)
    rollout = replace(made.rollout, turns=tuple(turns))
    sampled = -np.arange(1, rollout.response_mask.sum() + 1, dtype=np.float32)
    rollout = replace(rollout, rollout_logprobs=sampled, policy_versions=np.zeros(len(sampled), dtype=np.int32))
    return replace(made, rollout=rollout, ref_logprobs=sampled - 10)


def test_tokens_of_an_environment_are_read_and_nothing_else():
    # 10 11 | 40 41 | 12 | 42 | 13 14, and one turn that the environment ended.
    first = episode(0, [10, 11, 40, 41, 12, 42, 13, 14], [Turn(2, 4, 0.5), Turn(5, 6, -2.0), Turn(8, 8, 3.0)])
    second = episode(1, [15, 16, 17], [Turn(3, 3, 7.0)])
    batch = ExperienceBatch.from_table(experience_table([first, second, experience(2, 1, [-8])]))
    prompts = [3, 4], [3, 4, 5], [3, 4, 5, 6]
    tokens = [*prompts[0], 10, 11, 40, 41, 12, 42, 13, 14, *prompts[1], 15, 16, 17, *prompts[2], 10]
    assert batch.sequences.input_ids.tolist() == tokens
    assert batch.mask.sum(1).tolist() == [5, 3, 1]
    assert batch.rollout_logprobs.tolist() == [[-1, -2, -3, -4, -5], [-1, -2, -3, 0, 0], [-1, 0, 0, 0, 0]]
    assert batch.ref_logprobs[0].tolist() == [-11, -12, -13, -14, -15]
    assert batch.turn_rewards.tolist() == [[0, 0.5, -2, 0, 3], [0, 0, 7, 0, 0], [0, 0, 0, 0, 0]]
    assert first.rollout.sampled_ids.tolist() == [10, 11, 12, 13, 14]


def test_a_turn_without_tokens_gives_its_reward_to_the_token_before_it():
    row = episode(0, [10, 40, 41], [Turn(1, 2, 1.0), Turn(2, 3, 4.0)])
    assert ExperienceBatch.from_table(experience_table([row])).turn_rewards.tolist() == [[5.0]]
