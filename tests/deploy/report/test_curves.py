"""Curves, events and scores of the page."""

import json

import pytest

from common.metrics.table import STEP
from deploy.report.curves import GROUPS, MAX_POINTS, curves_of, metric_of, thinned
from deploy.report.events import events_of
from deploy.report.report import page_blocks
from deploy.report.run_files import RunFiles
from deploy.report.scores import scores_of
from tests.deploy.report.made_run import write_run


def test_every_metric_has_a_curve_in_a_named_group(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    keys = [
        metric.key.replace("NAME", "grader").replace("KEY", "speed")
        for metric in STEP
        if metric.key not in ("step", "time")
    ]
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "time": 1.0, **dict.fromkeys(keys, 2.5)}) + "\n")
    groups = curves_of(RunFiles.read(run))
    curves = {curve["key"]: curve for group in groups for curve in group["curves"]}
    assert set(keys) <= set(curves)
    assert all(curves[key]["y"] == [2.5] and curves[key]["meaning"] for key in keys)
    assert {group["name"] for group in groups} <= {name for name, _ in GROUPS} - {"Other"}
    assert all("](" not in curve["meaning"] for curve in curves.values())


def test_keys_of_sources_have_the_meaning_of_their_pattern():
    assert metric_of("reward/grader/score").key == "reward/NAME/score"
    assert metric_of("reward/grader/speed").key == "reward/NAME/KEY"
    assert metric_of("reward/grader/a/score").key == "reward/NAME/KEY"
    assert metric_of("reward/running_mean").key == "reward/running_mean"
    assert metric_of("of/a/newer/version") is None


def test_evaluations_are_drawn_at_the_version_they_judge(tmp_path):
    run = RunFiles.read(write_run(tmp_path / "run", steps=4))
    curves = {curve["key"]: curve for group in curves_of(run) for curve in group["curves"]}
    assert curves["rollout/score/mean"]["x"] == [0, 1, 2, 3]
    assert curves["rollout/score/mean"]["heldout"] == {"x": [0, 4], "y": [0.0, 1.0]}
    assert curves["reward/a_words/score"]["heldout"] == {"x": [0, 4], "y": [0.0, 1.0]}
    assert curves["heldout/pass_at_1"]["heldout"] == {
        "x": [0, 4],
        "y": [0.25, 0.75],
        "low": [0.1, 0.6],
        "high": [0.4, 0.9],
    }
    assert curves["heldout/judge"]["heldout"]["y"] == [1.0, 0.0]
    assert "heldout/voids" not in curves


def test_a_long_curve_keeps_its_peaks():
    values = [0.0] * 50_000
    values[31_234], values[44_321] = 9.0, -9.0
    steps, kept = thinned(list(range(50_000)), values)
    assert len(steps) == len(kept) <= MAX_POINTS
    assert kept[steps.index(31_234)] == 9.0
    assert kept[steps.index(44_321)] == -9.0
    assert steps == sorted(steps)


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    lines = [
        '{"step": 0, "time": 1, "ppo/entropy": 1.5}',
        '{"step": 1, "time": 1, "ppo/entropy": NaN}',
        '{"step": 2, "time": 1, "ppo/entropy": 2.5}',
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    curves = [c for group in curves_of(RunFiles.read(run)) for c in group["curves"] if c["key"] == "ppo/entropy"]
    assert [(c["x"], c["y"]) for c in curves] == [([0, 2], [1.5, 2.5])]


def test_an_event_belongs_to_the_step_that_ended_after_it(tmp_path):
    run = write_run(tmp_path / "run", steps=4)  # records are written at 1000.9, 1001.9, ...
    times = {"before": 900.0, "in_2": 1002.0, "after": 2000.0}
    lines = [json.dumps({"time": t, "replica": name, "event": "joined", "reason": ""}) for name, t in times.items()]
    lines.append(json.dumps({"time": 1001.0, "replica": "told", "event": "leaving"}))
    (run / "pool-events.jsonl").write_text("\n".join(lines) + "\n")
    events = [event for event in events_of(RunFiles.read(run)) if event["kind"] != "evaluation"]
    assert [(event["text"], event["step"]) for event in events] == [
        ("before joined", 0),
        ("in_2 joined", 2),
        ("after joined", 4),
    ]


def test_a_death_is_shown_with_its_reason(tmp_path):
    events = events_of(RunFiles.read(write_run(tmp_path / "run", steps=4)))
    assert {"step": 1, "kind": "died", "text": "Generator(0) died: killed <b>by</b> 9"} in events
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)


def test_the_calibration_is_read_next_to_the_reward_model(tmp_path):
    run = write_run(tmp_path / "ppo", steps=2)
    reward = tmp_path / "reward"
    (reward / "model").mkdir(parents=True)
    bins = [{"low": 0.5, "high": 0.6, "pairs": 9, "predicted": 0.55, "right": 0.5, "interval": [0.2, 0.8]}]
    records = [
        {"pairs": 8, "bins": []},
        {"pairs": 9, "accuracy": 0.7, "interval": [0.5, 0.8], "calibration_error": 0.1, "bins": bins},
    ]
    (reward / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = (
        (run / "config.toml")
        .read_text()
        .replace("function = ", "model = ")
        .replace("tests.tasks:a_words", str(reward / "model"))
    )
    (run / "config.toml").write_text(config)
    scores = scores_of(RunFiles.read(run))
    assert [(c["source"], c["pairs"], c["bins"]) for c in scores["calibrations"]] == [("a_words", 9, bins)]
    assert (scores["sources"], scores["judges"]) == (["a_words"], ["judge"])
    assert [(h["version"], h["kl"], h["score"]) for h in scores["heldout"]] == [(0, 0.0, 0.0), (2, 3.0, 1.0)]


def test_runs_without_a_reward_model_have_no_calibration(tmp_path):
    assert scores_of(RunFiles.read(write_run(tmp_path / "run", steps=1)))["calibrations"] == []


def with_large_numbers(value):
    """Copies of a record, each with another number replaced by one that no float can hold: (place, copy)."""
    if isinstance(value, dict):
        return [((key, *place), value | {key: new}) for key in value for place, new in with_large_numbers(value[key])]
    if isinstance(value, list):
        parts = [(i, place, new) for i, old in enumerate(value) for place, new in with_large_numbers(old)]
        return [((i, *place), [*value[:i], new, *value[i + 1 :]]) for i, place, new in parts]
    return [((), 10**400)] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "pool-events.jsonl"])
def test_a_number_that_no_float_can_hold_ends_no_report(tmp_path, name):
    run = write_run(tmp_path / "run", steps=3)
    first, *others = (run / name).read_text().splitlines()
    changed = with_large_numbers(json.loads(first))
    assert changed
    for place, record in changed:
        (run / name).write_text("\n".join([json.dumps(record), *others]) + "\n")
        files = RunFiles.read(run)
        page_blocks(files)
        if name == "metrics.jsonl":
            assert len(files.metrics) == (2 if place == ("step",) else 3)
        if place[-1] == "policy_version":
            assert len(files.evaluations) == len(others)
