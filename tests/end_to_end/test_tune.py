"""A real tuning, small: two trials of a tiny model on Ray, each in a process and a cluster of its own."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from unittest.mock import patch

import pytest

from common.config.loading import load_config
from common.config.ppo import Config
from common.files import read_records
from deploy.audit import run_audit
from deploy.run.record import read_record
from deploy.tune.command import Pace, run_tune
from deploy.tune.plan import make_plan
from learner.loop.journal import Journal
from tests import small_engine
from tests.fakes import save_tiny_model, tiny_config

pytestmark = pytest.mark.ray

STEPS = 3  # with an evaluation after every step: ASHA compares after the first one
RATES = (4e-3, 1e-7)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Both trials are finalists: one that ASHA stops continues."""
    directory = tmp_path_factory.mktemp("tune")
    cfg = tiny_config(
        save_tiny_model(directory / "model"),
        num_steps=STEPS,
        rollouts_per_step=32,
        evaluation={"prompts": 16, "pass_source": "a_words"},
        ppo={"clip_eps": 0.2, "minibatches": 4},
        optimizer={"value_head_learning_rate": 1e-2},
    )
    (directory / "tiny.toml").write_text(cfg.to_toml(), encoding="utf-8")
    space = f"optimizer.learning_rate={','.join(map(str, RATES))}"
    plan, cfg = make_plan(
        directory / "tiny.toml", [space], trials=2, metric="a_words", finalists=2, seeds=1, keep_all=False
    )
    plan = replace(plan, trials=tuple({"optimizer.learning_rate": rate} for rate in RATES))  # the better one first
    with patch.dict(os.environ, small_engine.variables()):
        outcome = run_tune(directory / "tune", Pace(), (plan, cfg))
    return directory / "tune", outcome


def test_the_trials_of_a_tuning_are_whole_runs_with_a_sound_journal(tuned):
    directory, outcome = tuned
    assert outcome.missing == 0
    found = json.loads((directory / "tune.json").read_text())
    for trial, rate in zip(found["trials"], RATES):
        run = directory / trial["directory"]
        cfg = load_config(run / "config.toml", [], Config)
        assert (cfg.optimizer.learning_rate, cfg.evaluation.every, cfg.seed) == (rate, 1, 0)
        assert Journal(run / "journal").next_step == STEPS
        evaluations = read_records(run / "evaluations.jsonl")
        assert [evaluation["policy_version"] for evaluation in evaluations] == [0, 1, 2, 3]
        assert list(trial["results"].values()) == [evaluation["components"]["a_words"] for evaluation in evaluations]
        assert len(read_record(run)["starts"]) == trial["trial"]  # ASHA stops the second one once
        assert run_audit(run) == 0


def test_asha_stops_the_trial_that_learns_nothing_and_it_continues(tuned):
    events = read_records(tuned[0] / "events.jsonl")
    of_second = [event["event"] for event in events if event.get("run") == "002" and event["event"] != "result"]
    assert of_second == ["stop", "end", "again", "end"]


def test_the_best_config_of_a_tuning_has_the_better_learning_rate(tuned):
    directory, outcome = tuned
    best = outcome.finalists[0]
    assert best.trial == 1
    assert load_config(directory / "best.toml", [], Config).optimizer.learning_rate == RATES[0]
