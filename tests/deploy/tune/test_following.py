"""What is read from the files of a run, and what ASHA learns from it."""

from __future__ import annotations

import pytest

from common.files import append_record
from deploy.tune.events import COMPLETE, STOPPED_BY_ASHA, Events
from deploy.tune.following import Follower, Job
from deploy.tune.metric import metric_of

RUNGS = (2, 6)
NAMES = {"001", "002", "003", "004"}


class Screen:
    def result(self, job, step, value):
        pass


def test_asha_decides_the_same_after_a_restart(tmp_path):
    """Each run is complete before anyone reads its files, as a fast one is."""
    events = Events(tmp_path / "events.jsonl")
    events.start(1.0)
    halving = events.halving(RUNGS, NAMES)

    def follow(trial, values):
        job = Job(trial)
        follower = Follower(job, tmp_path / job.name, "score", events, Screen(), halving)
        follower.directory.mkdir()
        for step, value in values.items():
            append_record(follower.directory / "evaluations.jsonl", {"policy_version": step, "score": value})
        follower.read_new()
        return follower

    # ASHA would have stopped the second and the third one at step 2.
    for trial, values in ((1, {2: 0.5, 6: 0.5}), (2, {2: 0.4, 6: 0.9}), (3, {2: 0.1, 6: 0.1})):
        follower = follow(trial, values)
        events.end(follower.job.name, COMPLETE, 1.0)
        follower.read_evaluations()
        assert events.run(follower.job.name).results == values
        assert events.run(follower.job.name).outcome == COMPLETE
    # Two thirds of 0.1, 0.5 and 0.9 are below 0.63. With the first run alone it would be 0.5.
    follow(4, {2: 0.6, 6: 0.6})
    assert events.run("004").outcome == STOPPED_BY_ASHA
    assert Events(tmp_path / "events.jsonl").halving(RUNGS, NAMES).stopped == {"002", "003", "004"}


def test_an_evaluation_without_a_sound_version_is_no_result(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events.start(1.0)
    follower = Follower(Job(1), tmp_path / "001", "score", events, Screen(), None)
    follower.directory.mkdir()
    for record in ({"policy_version": 10**400, "score": 1.0}, {"score": 1.0}, {"policy_version": 2, "score": 0.5}):
        append_record(follower.directory / "evaluations.jsonl", record)
    follower.read_new()
    assert Events(tmp_path / "events.jsonl").run("001").results == {2: 0.5}


@pytest.mark.parametrize(("metric", "value"), [("score", 1.0), ("pass_at_1", 0.5), ("voids", 0.25), ("other", None)])
def test_a_source_with_the_name_of_a_field_of_the_record_is_the_source(metric, value):
    record = {"score": 1, "pass_at_1": 0.5, "voids": 7, "prompts": 8, "components": {"voids": 0.25, "score": 3}}
    assert metric_of(record, metric) == value
