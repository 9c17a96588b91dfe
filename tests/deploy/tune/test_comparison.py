"""Which trials are compared at which step, and why the best one is the best."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from deploy.tune.comparison import compared_at, unselected
from deploy.tune.events import COMPLETE, CUT, FAILED, STOPPED_BY_ASHA, STOPPED_BY_HEALTH, Events, RunState
from deploy.tune.following import Job
from deploy.tune.outcome import Finalist, Outcome, outcome_of, write_outcome
from deploy.tune.search import Search
from tests.deploy.tune.test_search import STEPS, plan


def state(outcome, **results):
    return RunState({int(step[1:]): value for step, value in results.items()}, outcome)


TRIALS = {
    1: state(COMPLETE, _2=0.4, _6=0.5, _9=0.6),
    2: state(STOPPED_BY_ASHA, _2=0.1),
    3: state(STOPPED_BY_HEALTH, _2=0.3),
    4: state(FAILED, _1=0.9),
    5: state(None, _2=0.2, _3=0.3),  # the time was up
    6: state(STOPPED_BY_ASHA, _2=0.5, _6=0.2),
}


@pytest.mark.parametrize(
    ("step", "outcomes", "worst", "stopped"),
    [
        (2, {1: 0.4, 2: 0.1, 3: 0.3, 4: 0.1, 5: 0.2, 6: 0.5}, (4,), 0),
        (6, {1: 0.5, 3: 0.2, 4: 0.2, 6: 0.2}, (3, 4), 1),
        (9, {1: 0.6, 3: 0.6, 4: 0.6}, (3, 4), 2),
    ],
)
def test_trials_are_compared_at_equal_steps_and_ruined_ones_are_the_worst(step, outcomes, worst, stopped):
    found = compared_at(step, TRIALS)
    assert dict(zip(found.numbers, found.outcomes)) == outcomes
    assert (found.counted_as_worst, found.stopped_before) == (worst, stopped)


def test_the_headline_is_the_last_step_before_asha_chose_among_the_trials():
    found = [compared_at(step, TRIALS) for step in (2, 6, 9)]
    assert unselected(found).step == 2
    free = {number: replace(one, outcome=COMPLETE) for number, one in TRIALS.items() if number in (1, 6)}
    assert unselected([compared_at(step, free) for step in (2, 6, 9)]).step == 9
    assert unselected([compared_at(step, {}) for step in (2, 6)]).step == 2


def outcome(*finalists):
    made, _ = plan("kl.coef=0.1,0.2")
    return Outcome(made, {}, finalists, (), 0)


def test_the_seeds_of_all_finalists_say_how_large_chance_is():
    # Squares around the means 0.5 and 0.3: 0.02 and 0.02, with 1 + 2 degrees of freedom.
    found = outcome(Finalist(1, (0.4, 0.6), STEPS), Finalist(2, (0.2, 0.3, 0.4), STEPS))
    assert found.seed_deviation == pytest.approx((0.04 / 3) ** 0.5)
    # Standard error of the difference: 0.115 x sqrt(1 / 2 + 1 / 3) = 0.105; Student's t with freedom 3: 3.18.
    assert found.reason == (
        "trial 1 has score 0.5 at the last step, the mean of 2 seeds; 0.2 above trial 2 (95 % interval -0.14 to "
        "0.54), so the two are not clearly different"
    )


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (0.7, "0.4 above trial 2 (95 % interval 0.17 to 0.63), so it is better"),
        (0.5, "0.2 above trial 2 (95 % interval -0.027 to 0.43), so the two are not clearly different"),
    ],
)
def test_few_seeds_need_a_larger_difference(mean, said):
    """The standard error is 0.1 x sqrt(2 / 3) = 0.0816. 2.45 of them are not enough: Student's t is 2.78."""
    found = outcome(*(Finalist(trial, (at - 0.1, at, at + 0.1), STEPS) for trial, at in ((1, mean), (2, 0.3))))
    assert found.reason.endswith(said)


@pytest.mark.parametrize(
    ("finalists", "reason"),
    [
        ([], "no trial has an evaluation after its start, except those that failed or that a health rule ended"),
        (
            [Finalist(3, (0.5,), 6)],
            "no trial is complete, and trial 3 has done the most steps so far: score 0.5 at step 6",
        ),
        ([Finalist(3, (0.5,), STEPS)], "trial 3 has score 0.5 at the last step, with one seed"),
        (
            [Finalist(3, (0.5,), STEPS), Finalist(1, (0.4,), STEPS)],
            "trial 3 has score 0.5 at the last step, with one seed; 0.1 above trial 1; how much of that is chance "
            "is not known, because no trial has several seeds",
        ),
        (
            [Finalist(3, (0.5,), STEPS), Finalist(1, (0.6,), 6)],
            "trial 3 has score 0.5 at the last step, with one seed; trial 1 is the next one, and is not complete",
        ),
    ],
)
def test_the_reason_says_what_is_known(finalists, reason):
    assert outcome(*finalists).reason == reason


def search(directory, made):
    events = Events(directory / "events.jsonl")
    events.start(1.0)
    return Search(made, directory, events, None, 1.0)


def test_a_finalist_with_failed_seeds_loses_and_the_reason_names_them(tmp_path):
    made, _ = plan("kl.coef=0.1,0.2", trials=2, seeds=3)
    found = search(tmp_path, made)
    for trial, values in ((1, (0.9, None, None)), (2, (0.5, 0.5, 0.8))):
        for repeat, value in enumerate(values):
            name = Job(trial, repeat).name
            if value is not None:
                found.events.result(name, STEPS, value)
            found.events.end(name, FAILED if value is None else COMPLETE, 1.0)
    outcome = outcome_of(found)
    assert [(one.trial, one.failed) for one in outcome.finalists] == [(2, 0), (1, 2)]
    assert outcome.reason == (
        "trial 2 has score 0.6 at the last step, the mean of 3 seeds; trial 1 is the next one: 0.9, and 2 seed(s) "
        "failed"
    )


def test_a_trial_that_was_cut_before_its_first_evaluation_has_begun(tmp_path):
    made, cfg = plan("kl.coef=0.1,0.2", trials=2)
    (tmp_path / "config.toml").write_text(cfg.to_toml())
    found = search(tmp_path, made)
    found.events.end("001", CUT, 2.0)
    write_outcome(outcome_of(found), found)
    trials = json.loads((tmp_path / "tune.json").read_text())["trials"]
    assert [trial["outcome"] for trial in trials] == ["cut", "not begun"]
