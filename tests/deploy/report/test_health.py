"""The health events of the page, against the rules on the same records."""

import json

from common.health.health import Health
from deploy.report.health import health_events
from deploy.report.run_files import RunFiles
from tests.common.health.series import config, series
from tests.deploy.report.made_run import write_run


def run_with(tmp_path, records, cfg=None):
    run = write_run(tmp_path / "run", steps=1)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"time": 1.0, **record}) + "\n" for record in records))
    (run / "evaluations.jsonl").unlink()
    (run / "config.toml").write_text(cfg if isinstance(cfg, str) else (cfg or config()).to_toml())
    return RunFiles.read(run)


def test_a_steady_run_has_no_health_events(tmp_path):
    assert health_events(run_with(tmp_path, series(60))) == []


def test_an_event_is_shown_once_with_its_first_and_last_step(tmp_path):
    records = series(90, ppo__clip_frac=lambda step: 0.9 if 30 <= step < 50 or step >= 80 else 0.1)
    health = Health(config())
    held = [record["step"] for record in records if "clip_frac_high" in {e.rule for e in health.step(record)}]
    apart = next(i for i in range(1, len(held)) if held[i] - held[i - 1] > 20)
    found = [event for event in health_events(run_with(tmp_path, records)) if event["rule"] == "clip_frac_high"]
    expected = [(held[0], held[apart - 1], apart), (held[apart], held[-1], len(held) - apart)]
    assert [(event["step"], event["last"], event["times"]) for event in found] == expected
    assert found[0]["text"].startswith("clip_frac_high: ")
    assert found[0]["anchor"] == "docs/health.md#clip_frac_high"
    assert found[0]["advice"]


def test_a_config_of_another_version_leaves_the_recorded_names(tmp_path):
    records = [
        {"step": 0, "time": 1},
        {"step": 1, "time": 1, "health": ["kl_pinned"]},
        {"step": 2, "time": 1, "health": ["kl_pinned", "of_the_future"]},
    ]
    found = health_events(run_with(tmp_path, records, cfg="num_steps = 3\nnew_setting = 1\n"))
    assert [(event["rule"], event["step"], event["last"]) for event in found] == [
        ("kl_pinned", 1, 2),
        ("of_the_future", 2, 2),
    ]
    assert found[0]["text"] == "kl_pinned"


def test_a_judge_that_falls_in_evaluations_is_an_event(tmp_path):
    run = run_with(tmp_path, series(40))
    (run.directory / "evaluations.jsonl").write_text(
        '{"policy_version": 8, "score": 1.0, "components": {}, "health": ["judge_falls"]}\n'
        '{"policy_version": 40, "score": 1.0, "components": {}, "health": ["judge_falls"]}\n'
    )
    (run.directory / "config.toml").write_text("another = 1\n")
    [event] = health_events(RunFiles.read(run.directory))
    assert (event["rule"], event["step"], event["last"]) == ("judge_falls", 8, 40)
