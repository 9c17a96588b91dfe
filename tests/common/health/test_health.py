"""The health of a run: events that begin, last and end; a run that continues; evaluations; recorded runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from common.config.loading import load_config
from common.config.ppo import Config
from common.files import read_records
from common.health.health import RULES, Health, names
from tests.common.health.series import config, series
from tests.fakes import tiny_config

ROOT = Path(__file__).parents[3]
RECORDS = Path(__file__).parent / "records"


def clipping(length, *, until=10**9):
    return series(length, ppo__clip_frac=lambda step: 0.6 if step < until else 0.1)


def test_an_event_is_news_when_it_begins_and_then_ever_more_rarely():
    health = Health(config())
    found = [health.step(record) for record in clipping(120)]
    assert [step for step, events in enumerate(found) if events] == list(range(2, 120))
    assert [events[0].steps for events in found if events] == list(range(1, 119))
    assert [step for step, events in enumerate(found) if events and events[0].news] == [2, 11, 101]


def test_an_event_that_pauses_briefly_is_the_same_one():
    health = Health(config())
    on, off = clipping(1)[0], series(1)[0]
    records = [*[on] * 3, *[off] * 10, *[on] * 3, *[off] * 21, *[on] * 3]
    news = [step for step, record in enumerate(records) if any(event.news for event in health.step(record))]
    assert news == [2, 38]  # not again at 14, after a pause of 12


def test_active_names_the_rules_of_the_newest_step_and_evaluation():
    health = Health(config()).follow(clipping(10))
    assert health.active == {"clip_frac_high"}
    health.step(series(11)[-1])
    health.step(series(12)[-1])
    assert health.active == set()


def test_a_record_names_its_rules_and_only_if_there_are_some():
    health = Health(config())
    found = [names(health.step(record)) for record in clipping(4)]
    assert found == [{}, {}, {"health": ["clip_frac_high"]}, {"health": ["clip_frac_high"]}]


@pytest.mark.parametrize("cut", [1, 2, 3, 11, 60])
def test_a_continued_run_finds_what_an_uninterrupted_one_finds(cut, tmp_path):
    records = clipping(90, until=70)
    whole = Health(config())
    expected = [whole.step(record) for record in records]
    path = tmp_path / "metrics.jsonl"
    first = Health(config())
    for record in records[:cut]:
        with path.open("a") as file:
            file.write(json.dumps({**record, **names(first.step(record))}) + "\n")
    continued = Health(config()).follow(read_records(path))
    assert [continued.step(record) for record in records[cut:]] == expected[cut:]


def evaluation(version, score, judge, *, std=0.4, **fields):
    stds = {"exact": std, "human": std}
    record = {"policy_version": version, "prompts": 100, "voids": 0, "score": score, "score_std": std}
    return {**record, "components": {"exact": score, "human": judge}, "component_stds": stds, **fields}


JUDGED = {"evaluation": {"judges": [{"name": "human", "function": "tests.tasks:a_words"}]}}


@pytest.mark.parametrize(
    ("newest", "falls"),
    [
        # Standard errors of a difference: 0.4 * sqrt(2 / 100) = 0.057. Three of them: 0.17.
        (evaluation(20, 0.8, 0.3), True),  # the judge fell by 0.2 from its best, the score rose by 0.3
        (evaluation(20, 0.8, 0.35), False),  # fell by 0.15
        (evaluation(20, 0.6, 0.3), False),  # the score rose by 0.1
        (evaluation(20, 0.8, 0.3, std=1.0), False),
        (evaluation(20, 0.8, 0.3, prompts=100, voids=95), False),  # only 5 answers count
        (evaluation(20, 0.8, 0.3, judge_voids={"human": 95}), False),
        (evaluation(20, 0.8, 0.3, judge_voids={"other": 95}), True),
        (evaluation(20, 0.8, 0.3, component_stds=None), False),  # a record of an older version
    ],
)
def test_a_judge_that_falls_while_the_score_rises_is_named(newest, falls):
    health = Health(config(**JUDGED)).follow([], [evaluation(0, 0.2, 0.4), evaluation(10, 0.5, 0.5)])
    assert health.active == set()
    expected = ["the held-out score rose by 0.3 since version 10 while human fell by 0.2"] if falls else []
    assert [event.message for event in health.evaluation(newest)] == expected
    assert health.active == ({"judge_falls"} if falls else set())


def test_every_rule_has_a_paragraph_in_the_docs_and_no_other_does():
    page = (ROOT / "docs/health.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (\w+)$", page, flags=re.M) == list(RULES)


# Recorded runs, with the keys that the rules read: the demos, a tiny model, and the same with weights one step old.
TINY = {"rollouts_per_step": 32, "ppo": {"clip_eps": 0.2, "ppo_epochs": 2, "minibatches": 4}}
RUNS = {
    "larger": load_config(ROOT / "deploy/configs/larger.toml", ["num_steps=24"], Config),
    "positive": load_config(ROOT / "deploy/configs/positive.toml", [], Config),  # PPO of the human-feedback demo
    "tiny": tiny_config("model", num_steps=20, **TINY),
    "tiny-stale": tiny_config("model", num_steps=40, max_staleness=1, **TINY),
    "tiny-too-fast": tiny_config("model", num_steps=20, **TINY),  # learning rate 0.15 in place of 4e-3
    # reward.normalise "none", kl.coef 0.3, and value heads with the learning rates 1e-7 and 0.3 in place of 1e-2.
    "tiny-slow-critic": tiny_config("model", num_steps=40, rollouts_per_step=32),
    "tiny-wild-critic": tiny_config("model", num_steps=40, rollouts_per_step=32),
}
EXPECTED = {
    # Steps 31 to 35 have mean scores of 1, 1, 0.99, 1 and 1.
    "tiny-stale": {"scores_saturated": [35]},
    # After one step the policy is at 1.0, after two at 0.03, and in the end it writes one response, which scores 0.
    "tiny-too-fast": {
        "approx_kl_high": [*range(2, 16)],
        "entropy_collapsing": [*range(5, 20)],
        "scores_constant": [18, 19],
    },
    # Values stay at 0 where returns are 0.55, or swing around them.
    "tiny-slow-critic": {"critic_useless": [*range(19, 40)], "critic_miscalibrated": [*range(19, 40)]},
    "tiny-wild-critic": {"critic_useless": [*range(19, 40)], "critic_miscalibrated": [*range(19, 40)]},
}


@pytest.mark.parametrize("run", RUNS)
def test_recorded_runs_have_exactly_these_events(run):
    steps, health = read_records(RECORDS / f"{run}.jsonl"), Health(RUNS[run])
    assert len(steps) == RUNS[run].num_steps
    found: dict[str, list[int]] = {}
    for record in steps:
        for event in health.step(record):
            found.setdefault(event.rule, []).append(record["step"])
    assert found == EXPECTED.get(run, {})


def test_a_judge_that_rises_with_the_score_is_no_event():
    health = Health(RUNS["positive"])
    before, after = read_records(RECORDS / "positive-evaluations.jsonl")
    gold = [record["components"]["gold"] for record in (before, after)]
    assert (round(gold[0], 2), round(gold[1], 2)) == (0.25, 0.8)
    assert health.evaluation(before) + health.evaluation(after) == []
    # Had the judge liked it less than at the start, by 0.3 (standard error 0.04), it would be one.
    fallen = {**after, "components": {**after["components"], "gold": gold[0] - 0.3}}
    assert [event.rule for event in Health(RUNS["positive"]).follow([], [before]).evaluation(fallen)] == ["judge_falls"]


def test_scores_as_large_as_floats_can_be_end_no_run():
    health = Health(config())
    for record in series(30, rollout__score__mean=lambda step: (-1) ** step * 1.7e308, rollout__score__std=1.7e308):
        health.step(record)
