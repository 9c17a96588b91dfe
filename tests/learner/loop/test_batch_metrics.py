"""Metrics of a batch, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.experience_table import experience_table
from common.types import Experience, Score, Turn
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
    record = batch_metrics(experience_table(rows), [], policy_version=0)
    assert record["rollout/score/zero_std"] == pytest.approx(share)
    assert (record["rollout/score/std"] == 0.0) == (len(set(scores)) == 1)


def test_figures_of_sources_are_means_over_the_rollouts_that_have_them():
    scores = [
        Score(1.0, {"mean": 1.0, "std": 4.0}, {}, {"mean/std": 2.0, "std/rare": 5.0}),
        Score(3.0, {"mean": 3.0, "std": 8.0}, {}, {"mean/std": 4.0}),
    ]
    rows = [Experience(make_rollout(make_prompt(n), [4, END]), score, None) for n, score in enumerate(scores)]
    record = batch_metrics(experience_table(rows), [], policy_version=0)
    assert (record["rollout/score/mean"], record["rollout/score/std"]) == (2.0, 1.0)  # of the totals 1 and 3
    own = {key: value for key, value in record.items() if key.startswith("reward/")}
    assert own == {"reward/mean/score": 2.0, "reward/std/score": 6.0, "reward/mean/std": 3.0, "reward/std/rare": 5.0}


def test_the_number_of_figures_of_a_source_is_bounded():
    scores = [Score(1.0, {"s": 1.0}, {}, {f"s/f{n:03d}": 1.0, "t/x": 2.0}) for n in range(MAX_FIGURES + 5)]
    rows = [Experience(make_rollout(make_prompt(n), [4, END]), score, None) for n, score in enumerate(scores)]
    record = batch_metrics(experience_table(rows), [], policy_version=0)
    assert sum(key.startswith("reward/s/f") for key in record) == MAX_FIGURES
    assert record["reward/t/x"] == 2.0


def test_metrics_of_an_environment_are_those_of_its_episodes():
    def episode(index: int, response: list[int], *turns: Turn, reason: str) -> Experience:
        made = make_experience(index, response)
        rollout = replace(made.rollout, turns=turns, finish_reason=reason)
        sampled = int(rollout.response_mask.sum())
        arrays = {"rollout_logprobs": np.zeros(sampled, np.float32), "policy_versions": np.zeros(sampled, np.int32)}
        return replace(made, rollout=replace(rollout, **arrays), ref_logprobs=arrays["rollout_logprobs"])

    calls = '{"tool_calls": 2, "failed_calls": 1}'
    over = "terminated"
    rows = [
        # Prompts have 2, 3 and 4 tokens.
        episode(0, [9, 9, 8, 8, 9], Turn(2, 4, 0, "[]", calls, 0.5), Turn(5, 5, 1, "[]", "{}", 0.1, 4), reason=over),
        episode(1, [9, 8, 9], Turn(1, 2, 0, "[]", calls, 0.2), Turn(3, 3, 1, "[]", "{}", 0.4, 0), reason="max_turns"),
        episode(2, [9, 9], Turn(2, 2, 1.0, seconds=0.3), reason=over),
        # The second turn begins a new context of 3 tokens, and sees it alone: 2 of them, and then 4.
        episode(3, [9, 8, 8, 9, 8, 9], Turn(1, 3, 0, new_context=True), Turn(4, 5, 0, cached_tokens=1),
                Turn(6, 6, 0, cached_tokens=2), reason=over),
    ]  # fmt: skip
    voids = ["raised", "", "timed_out", "raised", ""]  # "": something else than the environment
    record = batch_metrics(experience_table(rows), voids, policy_version=0)
    found = {key: value for key, value in record.items() if key.startswith("environment/")}
    assert found == pytest.approx(
        {
            "environment/turns": 8 / 4,
            "environment/contexts": (1 + 1 + 1 + 2) / 4,
            "environment/tokens": 6 / 4,
            "environment/step_s/mean": 1.5 / 8,
            "environment/step_s/max": 0.5,
            "environment/cached": (4 + 1 + 2) / ((2 + 4) + (3 + 2) + (2 + 4)),
            "environment/recomputed": 0,  # no context fills a block
            # The longest contexts: prompts and responses; in the last episode the 5 tokens from place 1 on.
            "environment/context_tokens": ((2 + 5) + (3 + 3) + (4 + 2) + max(2 + 1, 5)) / 4,
            "environment/tool_calls": 4 / 4,
            "environment/failed_calls": 2 / 4,
            "environment/voids/raised": 2,
            "environment/voids/timed_out": 1,
            "environment/voids/wrong_answer": 0,
            "environment/voids/template": 0,
            "environment/voids/died": 0,
        }
    )
    assert record["rollout/voids"] == 5
    assert record["rollout/finished"] == pytest.approx(3 / 4)
    assert record["rollout/response_tokens/mean"] == pytest.approx((3 + 2 + 2 + 3) / 4)  # without the environment's


PROMPT = np.arange(40, dtype=np.int32)


def two_turns(
    said: np.ndarray,
    cached: int,
    *,
    prompt_ids: np.ndarray = PROMPT,
    versions: tuple[int, int, int] = (3, 3, 3),
    **flags: bool,
) -> Experience:
    """An episode: a prompt, by default of 40 tokens, a turn of 30, what the environment says, and a turn of 20.
    `cached`: tokens that the engine found for the second turn. `versions`: of the first turn's halves, and of the
    second turn."""
    made = make_experience(0, [1])
    response = np.concatenate([np.full(30, 100), said, np.full(20, 101)]).astype(np.int32)
    next_start, end = 30 + len(said), 50 + len(said)
    arrays = {
        "rollout_logprobs": np.zeros(50, np.float32),
        "policy_versions": np.repeat(np.asarray(versions, np.int32), [15, 15, 20]),
    }
    turns = (Turn(30, next_start, 0.0, **flags), Turn(end, end, 0.0, cached_tokens=cached))
    prompt = replace(made.rollout.prompt, token_ids=prompt_ids)
    rollout = replace(made.rollout, prompt=prompt, response_ids=response, turns=turns, **arrays)
    return replace(made, rollout=rollout, ref_logprobs=arrays["rollout_logprobs"])


def recomputed(*rows: Experience) -> float:
    return batch_metrics(experience_table(list(rows)), [], policy_version=3)["environment/recomputed"]


SAID = np.full(10, 7)


@pytest.mark.parametrize(
    ("cached", "tokens"),
    # The first turn computed 40 + 29 tokens, as its last one was not read again: two whole blocks of 32.
    [(0, 64), (32, 32), (64, 0), (80, 0)],
)
def test_tokens_that_the_cache_has_lost_are_computed_again(cached, tokens):
    assert recomputed(two_turns(SAID, cached)) == tokens


@pytest.mark.parametrize(("length", "tokens"), [(34, 32), (35, 64)])
def test_the_last_token_of_a_turn_is_in_no_cache(length, tokens):
    assert recomputed(two_turns(SAID, 0, prompt_ids=PROMPT[:length])) == tokens  # of length + 29 computed ones


def test_lost_tokens_are_a_mean_over_episodes():
    one_turn = make_experience(1, [9, 9])
    turns = (Turn(2, 2, 1.0),)
    one_turn = replace(one_turn, rollout=replace(one_turn.rollout, turns=turns))
    assert recomputed(two_turns(SAID, 0), two_turns(SAID, 64), two_turns(SAID, 32), one_turn) == (64 + 0 + 32 + 0) / 4


@pytest.mark.parametrize("versions", [(3, 3, 4), (3, 4, 4), (2, 3, 3)])
def test_tokens_of_older_weights_are_not_lost_by_the_cache(versions):
    """An engine uses no states of older weights. A turn that began with them has none of the newer ones."""
    assert recomputed(two_turns(SAID, 0, versions=versions)) == 0


def test_a_new_context_could_use_what_both_contexts_begin_with():
    again = np.concatenate([PROMPT, np.full(5, 8)])  # 40 equal tokens: one whole block
    assert recomputed(two_turns(again, 0, new_context=True)) == 32
    assert recomputed(two_turns(again, 32, new_context=True)) == 0
    assert recomputed(two_turns(SAID, 0, new_context=True)) == 0  # nothing is equal
    whole = np.concatenate([PROMPT, np.full(30, 100), np.full(5, 8)])  # 70 equal tokens, of which 69 were computed
    assert recomputed(two_turns(whole, 0, new_context=True)) == 64


def test_the_longest_context_of_an_episode_is_measured():
    rows = [two_turns(SAID, 0), two_turns(np.full(100, 8), 0, new_context=True), two_turns(SAID, 0, new_context=True)]
    record = batch_metrics(experience_table(rows), [], policy_version=3)
    assert record["environment/context_tokens"] == pytest.approx((40 + 60 + 100 + 20 + 70) / 3)


def test_episodes_of_one_turn_have_no_figures_of_the_cache():
    made = make_experience(0, [9, 9])
    row = replace(made, rollout=replace(made.rollout, turns=(Turn(2, 2, 1.0),)))
    record = batch_metrics(experience_table([row]), [], policy_version=0)
    assert record["environment/turns"] == 1
    assert not {"environment/cached", "environment/recomputed", "environment/context_tokens"} & record.keys()
