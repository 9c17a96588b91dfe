"""The plan of a tuning: what is refused before anything starts, and what the trials get."""

from __future__ import annotations

import pytest

from common.errors import UserError
from deploy.run.directory import sole_owner
from deploy.tune.command import Pace, run_tune
from deploy.tune.plan import Plan, make_plan
from tests.deploy.tune.test_search import CONFIG, plan

POSITIVE = CONFIG.with_name("positive.toml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ppo.clip_epsilon=0.1,0.2"],
            r"trial 1 of 2 .*so none does: (?s:.*)ppo.clip_epsilon: unknown key; did you mean clip_eps",
        ),
        (
            ["ppo.clip_eps=0.1,-1"],
            "ppo.clip_eps = -1: input should be greater than 0",
        ),
        (["ppo.minibatches=4,5"], r"rollouts_per_step \(64\) must be a multiple of ppo.minibatches \(5\)"),
        (["ppo.policy_loss=clip,masks"], "ppo.policy_loss = 'masks'"),
        (["kl.coef=0.1"], "name at least one key with several values"),
        (["kl.coef=0.1,0.2", "kl.coef=0.3,0.4"], "kl.coef is given 2 times"),
        (["kl.coef=0.1,0.2", "kl={coef=0.3}"], "kl has kl.coef in it, so one would override the other"),
        (["ppo.lam=0.9", "ppo={lam=0.8},{lam=0.7}"], "ppo has ppo.lam in it, so one would override the other"),
        (["seed=1,2"], r"seed cannot differ between trials: .* finalists are repeated with others \(--seeds\)"),
        (["model.path=a,b"], "model.path cannot differ between trials"),
        (["evaluation.prompts=4,8"], "evaluation.prompts cannot differ between trials"),
        (["evaluation={prompts = 8},{prompts = 16}"], "evaluation cannot differ between trials"),
        (["sampling.temperature=0.7,1.0"], "sampling.temperature cannot differ between trials: held-out responses"),
        (["environment.max_turns=2,8"], "environment.max_turns cannot differ between trials: held-out episodes are"),
        (["prompts.format=chat,text"], "prompts.format cannot differ between trials"),
        (["prompts.columns.prompt=a,b"], "prompts.columns.prompt cannot differ between trials"),
        (["ppo.lam=1,1.0"], r"trials 1 and 2 would have the same config \(ppo.lam=1(.0)?; ppo.lam=1(.0)?\)"),
        (["reward.sources.1.weight=-1.0..0.0"], "reward.sources.1.weight changes what a score means"),
        (["kl.coef=0.1,0.2", "evaluation.prompts=0"], "trials are compared on held-out prompts"),
        (["ppo.clip_eps"], "must read KEY=SPACE"),
    ],
)
def test_what_cannot_be_tuned_is_refused_with_one_message(arguments, message):
    with pytest.raises(UserError, match=message):
        plan(*arguments)


def test_the_metric_is_pass_at_1_where_the_config_says_what_passes():
    given = {"trials": 2, "finalists": 1, "seeds": 1, "keep_all": False}
    space = ["kl.coef=0.1,0.2"]
    assert make_plan(CONFIG, space, metric=None, **given)[0].metric == "pass_at_1"
    assert make_plan(CONFIG, space, metric="correct", **given)[0].metric == "correct"
    assert make_plan(POSITIVE, space, metric="gold", **given)[0].metric == "gold"
    with pytest.raises(UserError, match=r"--metric \(golden\) must be one of pass_at_1, score, reward_model, gold"):
        make_plan(POSITIVE, space, metric="golden", **given)


@pytest.mark.parametrize("metric", ["correct", "pass_at_1"])
@pytest.mark.parametrize("key", ["reward.sources.0.function", "reward.sources", "reward"])
def test_the_source_that_trials_are_compared_by_cannot_differ(metric, key):
    with pytest.raises(UserError, match=rf"{key} may change the source correct, by which trials are compared"):
        plan(f"{key}=a,b", metric=metric)


def test_more_trials_than_the_limit_are_refused():
    with pytest.raises(UserError, match=r"--trials \(1001\) must not exceed 1000"):
        plan("kl.coef=0.1..0.2", trials=1001)


def test_more_seeds_than_the_limit_are_refused():
    with pytest.raises(UserError, match=r"--seeds \(101\) must not exceed 100"):
        make_plan(CONFIG, ["kl.coef=0..1"], trials=2, metric=None, finalists=1, seeds=101, keep_all=False)


def test_settings_of_all_trials_may_be_given_as_a_section_and_a_key():
    _, cfg = plan("ppo.lam=0.9,0.8", "kl={coef=0.3}", "kl.coef=0.4")
    assert cfg.kl.coef == 0.4


def test_names_of_files_do_not_depend_on_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path / "here")
    made, _ = plan("prompts.train=../one.jsonl,../two.jsonl", trials=2)
    monkeypatch.chdir(tmp_path)
    expected = {str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")}
    assert {trial["prompts.train"] for trial in made.trials} == set(made.keys[0].values) == expected


def test_a_source_may_be_tuned_against_a_judge():
    made, _ = make_plan(
        CONFIG,
        ["reward.sources.1.weight=-1.0..0.0"],
        trials=3,
        metric="correct",
        finalists=1,
        seeds=1,
        keep_all=False,
    )
    assert all(-1 <= trial["reward.sources.1.weight"] <= 0 for trial in made.trials)


@pytest.mark.parametrize(
    ("settings", "every", "rungs"),
    [
        (["num_steps=14"], 2, (2, 6)),
        (["num_steps=60"], 10, (10, 30)),
        (["num_steps=60", "evaluation.every=4"], 4, (4, 12, 36)),
        (["num_steps=60", "evaluation.every=4", "optimizer.warmup_steps=9"], 4, (12, 36)),
        (["num_steps=3"], 1, (2,)),
    ],
)
def test_rungs_are_evaluations_after_all_warm_ups(settings, every, rungs):
    """The warm-up of the shipped config is 1 step."""
    made, cfg = make_plan(
        CONFIG,
        ["kl.coef=0.1,0.2", *settings],
        trials=2,
        metric=None,
        finalists=1,
        seeds=1,
        keep_all=False,
    )
    assert (made.every, cfg.evaluation.every, made.rungs) == (every, every, rungs)
    assert all(rung % every == 0 for rung in made.rungs)


def test_trials_keep_small_checkpoints_unless_told_otherwise():
    made, cfg = plan("kl.coef=0.1,0.2")
    assert (cfg.checkpoint.keep, cfg.checkpoint.keep_optimizer_at_end) == (1, False)
    assert made.given == {
        "evaluation.every": 0,
        "checkpoint.keep": 2,
        "checkpoint.keep_optimizer_at_end": True,
    }
    made, cfg = plan("kl.coef=0.1,0.2", "checkpoint.keep=3")
    assert (cfg.checkpoint.keep, made.given["checkpoint.keep"]) == (3, 3)


def test_a_tuned_warm_up_counts_with_its_longest_value():
    made, _ = plan("optimizer.warmup_steps=1,4", trials=2)
    assert made.rungs == (5,)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    made, _ = plan("kl.coef=log:0.001..0.1", "ppo.policy_loss=clip,mask")
    made.write(tmp_path)
    assert Plan.read(tmp_path) == made


def test_a_directory_of_another_command_does_not_continue(tmp_path):
    with pytest.raises(UserError, match=r"has no plan\.json of ratchet tune"):
        Plan.read(tmp_path)
    with pytest.raises(UserError, match=r"is no run directory.*name one that ratchet tune has made"):
        run_tune(tmp_path / "missing", Pace())
    assert not (tmp_path / "missing").exists()


START = '{"event": "start", "time": 1.0, "hours": 1}\n'


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "result"}',
        '{"event": ["result"], "time": 1.0}',
        '{"event": "other", "time": 1.0}',
        START + '{"event": "result", "time": 1.0, "run": "001", "step": 1, "value": null}',
        '{"event": "again", "time": 1.0, "run": "001"}',  # before a start
    ],
)
def test_a_tuning_with_foreign_events_is_refused_and_keeps_them(tmp_path, line):
    made, cfg = plan("kl.coef=0.1,0.2")
    with sole_owner(tmp_path / "tune") as owned:
        owned.begin(cfg, "tune", force=False)
    made.write(tmp_path / "tune")
    events = tmp_path / "tune/events.jsonl"
    events.write_text(line)
    with pytest.raises(UserError, match=r'events\.jsonl has a line that ratchet tune has not written \({"event": .*\)'):
        run_tune(tmp_path / "tune", Pace())
    assert events.read_text() == line
