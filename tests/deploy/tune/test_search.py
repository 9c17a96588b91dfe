"""Whole tunings, with a small script in place of `ratchet train`."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from common.files import read_records
from deploy.tune.command import Pace, run_tune
from deploy.tune.events import EVENTS, Events
from deploy.tune.plan import make_plan
from deploy.tune.search import Search
from tests.deploy.tune import fake_trial

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "deploy/configs/larger.toml"
STEPS = 9  # with a warm-up of 1 and an evaluation after every step, rungs are at 2 and 6
LIMIT_S = 60


def fake(arguments):
    return [sys.executable, "-S", fake_trial.__file__, *arguments]


def plan(*arguments, trials=6, metric="score", finalists=2, seeds=2, keep_all=False):
    return make_plan(
        CONFIG,
        [f"num_steps={STEPS}", *arguments],
        trials=trials,
        metric=metric,
        finalists=finalists,
        seeds=seeds,
        keep_all=keep_all,
    )


def tune(directory, new=None, *, hours=1.0, at_once=1):
    return run_tune(directory, Pace(hours, at_once), new, command=fake, poll_s=0.01)


def records(directory):
    return json.loads((directory / "tune.json").read_text())


def starts(directory):
    """How often each run was started, by its name."""
    found = {}
    for path in sorted((directory / "trials").glob("*/starts.jsonl")):
        found[fake_trial.name(path.parent)] = len(read_records(path))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tuning that nothing has disturbed."""
    directory = tmp_path_factory.mktemp("tune") / "whole"
    space = ["optimizer.learning_rate=log:1e-7..1e-3", "ppo.clip_eps=0.1,0.2", "ppo.entropy_coef=0,0.01"]
    outcome = tune(directory, plan(*space, trials=8))
    return directory, outcome


def test_every_trial_has_a_run_directory_of_its_own(whole):
    directory, _ = whole
    trials = records(directory)["trials"]
    assert len(trials) == len({trial["directory"] for trial in trials}) == 8
    assert all((directory / trial["directory"] / "evaluations.jsonl").exists() for trial in trials)
    assert trials[0]["directory"].startswith("trials/001-learning_rate-")


def test_asha_stops_trials_at_rungs_only_and_the_rest_are_complete(whole):
    directory, _ = whole
    reached = {}
    for trial in records(directory)["trials"]:
        reached.setdefault(trial["outcome"], set()).add(max(map(int, trial["results"])))
    assert reached["asha"] <= {2, 6}
    assert reached["complete"] == {STEPS}
    assert set(reached) == {"asha", "complete"}


def test_a_trial_is_stopped_exactly_when_it_is_below_the_best_third(whole):
    """By definition, from the results in their order."""
    directory, _ = whole
    came, stopped = {2: [], 6: []}, set()
    for event in read_records(directory / "events.jsonl"):
        if event["event"] == "result" and "repeat" not in event["run"] and event["step"] in came:
            before = sorted(came[event["step"]])
            place = (len(before) - 1) * 2 / 3  # of the value below which two thirds of the earlier ones are
            low = int(place)
            above = before[min(low + 1, len(before) - 1)] if before else 0.0
            cutoff = before[low] + (place - low) * (above - before[low]) if before else 0.0
            came[event["step"]].append(event["value"])
            if event["value"] < cutoff:
                stopped.add(event["run"])
    events = read_records(directory / "events.jsonl")
    assert {event["run"] for event in events if event["event"] == "stop"} == stopped != set()


def test_finalists_have_further_seeds_and_the_best_mean_wins(whole):
    directory, outcome = whole
    found = records(directory)
    assert [len(one["values"]) for one in found["finalists"]] == [2, 2]
    assert sorted(one["seed"] for one in found["repeats"]) == [1, 1]
    best = max(found["finalists"], key=lambda one: sum(one["values"]) / 2)
    assert found["best"]["trial"] == best["trial"] == outcome.finalists[0].trial
    assert best["values"][1] == pytest.approx(best["values"][0] + 0.01)  # the second seed adds that
    assert found["seed_deviation"] == pytest.approx(0.01 / 2**0.5)


def test_the_best_config_is_the_given_one_with_the_best_settings(whole):
    directory, _ = whole
    best = records(directory)["best"]
    settings = [f"{key}={value}" for key, value in best["settings"].items()]
    expected = load_config(CONFIG, [f"num_steps={STEPS}", *settings], Config)
    assert load_config(directory / "best.toml", [], Config) == expected
    assert expected.evaluation.every == 0  # that of the trials is not the user's
    assert best["reason"] in (directory / "best.toml").read_text()


def test_nothing_runs_again_when_a_finished_tuning_continues(whole):
    directory, outcome = whole
    before = starts(directory), records(directory)["trials"]
    assert tune(directory).finalists == outcome.finalists
    assert (starts(directory), records(directory)["trials"]) == before


def test_the_learning_rate_matters_and_a_key_without_effect_does_not(tmp_path):
    space = ["optimizer.learning_rate=log:1e-7..1e-3", "ppo.entropy_coef=0,0.01"]
    tune(tmp_path / "all", plan(*space, trials=12, finalists=1, seeds=1, keep_all=True))
    found = json.loads((tmp_path / "all/sensitivity.json").read_text())
    keys = {one["key"]: one for one in found["steps"][-1]["keys"]}
    assert found["compared_at_step"] == STEPS
    assert keys["optimizer.learning_rate"]["mattered"]
    assert not keys["ppo.entropy_coef"]["mattered"]
    assert "did not matter as far as 12 trials can tell" in keys["ppo.entropy_coef"]["sentence"]
    assert 1e-6 < keys["optimizer.learning_rate"]["best"] < 1e-4


SMALL = ("ppo.clip_eps=0.1,0.2,0.3,0.4", "optimizer.learning_rate=1e-5,1e-6")


def small_plan():
    return plan(*SMALL, trials=4, finalists=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tune") / "small"
    tune(directory, small_plan())
    return directory


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_a_tuning_that_is_ended_continues_with_the_results_of_a_whole_one(kill, small, tmp_path):
    directory, hold = tmp_path / "cut", tmp_path / "hold"
    hold.write_text("002 1")
    command = [sys.executable, "-c", DRIVER, str(directory)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    held = wait_for(lambda: list(directory.glob("trials/002-*/held")))
    pid = read_records(held[0].parent / "starts.jsonl")[-1]["pid"]
    process.send_signal(kill)
    _, printed = process.communicate(timeout=LIMIT_S)
    assert process.returncode == (-kill if kill == signal.SIGKILL else 128 + kill)
    assert kill == signal.SIGKILL or b"ratchet tune --resume" in printed
    wait_for(lambda: not Path(f"/proc/{pid}").exists())  # its run was stopped with it
    hold.unlink()
    tune(directory)
    assert starts(directory) == {**starts(small), "002": 2}
    for key in ("best", "finalists"):
        assert records(directory)[key] == records(small)[key]
    results = [[trial["results"] for trial in records(where)["trials"]] for where in (directory, small)]
    assert results[0] == results[1]


DRIVER = """
import sys
from pathlib import Path
from deploy.ending import exit_message
from tests.deploy.tune.test_search import small_plan, tune

def work():
    directory = Path(sys.argv[1])
    exit_message.run_begins(directory, f"continue with ratchet tune --resume {directory}")
    tune(directory, small_plan())

exit_message.main(work)
"""


def wait_for(condition):
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_health_and_failures_end_a_trial_and_count_as_the_worst(tmp_path):
    directory = tmp_path / "ill"
    tune(directory, plan("ppo.value_coef=0.5,0.6,0.7,7,8", trials=5, keep_all=True, finalists=1, seeds=1))
    trials = {trial["settings"]["ppo.value_coef"]: trial for trial in records(directory)["trials"]}
    assert trials[7]["outcome"] == "health"
    assert trials[7]["why"].startswith("kl_exploding in 3 steps in a row")
    assert trials[8]["outcome"] == "failed"
    assert trials[8]["why"] == "exit code 1: mismatch/kl was above ppo.max_mismatch_kl"
    assert [trials[value]["outcome"] for value in (0.5, 0.6, 0.7)] == ["complete"] * 3
    end = json.loads((directory / "sensitivity.json").read_text())["steps"][-1]
    assert len(end["trials"]) == 5
    assert len(end["counted_as_worst"]) == 2
    assert tune(directory).missing == 0  # none of them is tried again
    assert sorted(starts(directory).values()) == [1, 1, 1, 1, 2]  # a run that fails is tried twice


def test_a_tuning_ends_when_its_first_trials_cannot_start(tmp_path):
    message = (
        r"^3 run\(s\) in a row have failed without an evaluation in between \(trial 1, 2, 3\); trial 3 ended with exit "
        r"code 1: nothing fits \(all of its output .*again with --force"
    )
    with pytest.raises(UserError, match=message):
        tune(tmp_path / "no", plan("ppo.value_coef=9,10,11,12"))
    assert len(list((tmp_path / "no/trials").glob("*.log"))) == 3


def test_a_first_trial_that_cannot_start_does_not_end_the_tuning(tmp_path):
    directory = tmp_path / "one"
    made, cfg = plan("ppo.value_coef=9,0.5,0.6", trials=3, finalists=1, seeds=1)
    bad_first = sorted(made.trials, key=lambda settings: -settings["ppo.value_coef"])
    outcome = tune(directory, (replace(made, trials=tuple(bad_first)), cfg))
    assert [trial["outcome"] for trial in records(directory)["trials"]] == ["failed", "complete", "complete"]
    assert outcome.missing == 0
    ends = [event["run"] for event in read_records(directory / "events.jsonl") if event["event"] == "end"]
    assert ends == ["001", "002", "003", "001"]


def test_a_fault_of_the_machine_costs_no_trial(tmp_path):
    """The machine fails after the first trials, and is mended before the tuning continues."""
    directory = tmp_path / "machine"
    made, cfg = plan(
        "ppo.clip_eps=0.2,0.9", "ppo.entropy_coef=0,0.01,0.02", trials=6, finalists=1, seeds=1, keep_all=True
    )
    broken_last = sorted(made.trials, key=lambda settings: settings["ppo.clip_eps"])
    with pytest.raises(
        UserError, match=r"^3 run\(s\) in a row have failed .* \(trial 4, 5, 6\); trial 6 ended with exit"
    ):
        tune(directory, (replace(made, trials=tuple(broken_last)), cfg))
    (tmp_path / "mended").touch()
    assert tune(directory).missing == 0
    assert [trial["outcome"] for trial in records(directory)["trials"]] == ["complete"] * 6


def test_a_trial_that_never_starts_counts_as_the_worst(tmp_path):
    directory = tmp_path / "never"
    tune(directory, plan("ppo.value_coef=0.5,0.6,0.7,9", trials=4, keep_all=True, finalists=1, seeds=1))
    end = json.loads((directory / "sensitivity.json").read_text())["steps"][-1]
    [failed] = [trial for trial in records(directory)["trials"] if trial["settings"]["ppo.value_coef"] == 9]
    assert (failed["outcome"], failed["why"]) == ("failed", "exit code 1: nothing fits")
    assert end["counted_as_worst"] == [failed["trial"]]


@pytest.mark.parametrize(
    ("run_s", "seeds", "broken", "order"),
    [
        (60, 2, (), "001 002 003 004 001-repeat-1 002-repeat-1"),  # everything fits
        (700, 3, (), "001 002 001-repeat-1 002-repeat-1 001-repeat-2"),  # half of the hour is for trials
        (700, 2, (2, 3), "001 002 003 001-repeat-1 004"),  # one finalist alone leaves time for another trial
    ],
)
def test_an_hour_has_time_for_trials_and_for_finalists(run_s, seeds, broken, order, tmp_path, monkeypatch, capsys):
    ended = []
    end = Search._end

    def after_run_s(search, job, process, code, seconds):
        ended.append(job.name)
        end(search, job, process, code, run_s)

    monkeypatch.setattr(Search, "_end", after_run_s)
    monkeypatch.setattr(Events, "seconds", property(lambda events: run_s * len(ended)))
    made, cfg = plan("ppo.clip_eps=0.4,0.3,0.2,0.1", trials=4, seeds=seeds, keep_all=True)
    best_first = sorted(made.trials, key=lambda settings: -settings["ppo.clip_eps"])
    trials = [one | ({"ppo.value_coef": 9} if number in broken else {}) for number, one in enumerate(best_first, 1)]
    outcome = tune(tmp_path / "hour", (replace(made, trials=tuple(trials)), cfg))
    assert " ".join(ended) == order
    missing = f"{outcome.missing} run(s) did not fit into 1 hours; continue with"
    assert (missing in capsys.readouterr().err) == (run_s == 700)


def test_a_time_out_of_another_cause_is_not_the_end_of_the_time(tmp_path, monkeypatch):
    def disk_fails(*arguments):
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr(Search, "_halving", disk_fails)
    with pytest.raises(TimeoutError, match="Connection timed out"):
        tune(tmp_path / "disk", small_plan())


def test_when_the_time_is_up_the_best_so_far_is_kept_and_the_rest_can_follow(tmp_path, capsys, monkeypatch):
    directory, hold = tmp_path / "short", tmp_path / "hold"
    hold.write_text("002 4")
    timeout = asyncio.timeout

    @asynccontextmanager
    async def until_held(seconds):
        """The hour is over when trial 2 waits after its step 4."""
        async with timeout(seconds) as limit:

            async def watch():
                while not list(directory.glob("trials/002-*/held")):
                    await asyncio.sleep(0.01)
                limit.reschedule(asyncio.get_running_loop().time())

            watching = asyncio.create_task(watch())
            try:
                yield limit
            finally:
                watching.cancel()

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "timeout", until_held)
        outcome = tune(directory, plan("ppo.clip_eps=0.3,0.1,0.2", trials=3, keep_all=True))
    assert (outcome.missing, len(outcome.finalists)) == (3, 1)  # trials 2 and 3, and a further seed of the first one
    assert "--hours 2" in capsys.readouterr().err
    assert (directory / "best.toml").exists()
    hold.unlink()
    outcome = tune(directory, hours=1.0)
    assert outcome.missing == 0
    assert records(directory)["best"]["settings"] == {"ppo.clip_eps": 0.3}
    assert starts(directory)["002"] == 2


def test_an_interrupted_trial_is_the_best_so_far_if_none_is_complete(tmp_path, capsys):
    directory = tmp_path / "early"
    new = plan("ppo.clip_eps=0.3,0.1", trials=2)
    tune(directory, new, hours=1e-9)
    assert "best.toml" not in capsys.readouterr().out
    assert not (directory / "best.toml").exists()
    events = Events(directory / EVENTS)
    events.start(1.0)
    for step, value in ((0, 0.1), (1, 0.2), (2, 0.3)):
        events.result("001", step, value)
    tune(directory, hours=1e-9)
    assert records(directory)["best"]["reason"] == (
        "no trial is complete, and trial 1 has done the most steps so far: score 0.3 at step 2"
    )
    assert "best.toml" in capsys.readouterr().out


def test_several_runs_at_once_have_the_same_outcomes(tmp_path):
    space = ["ppo.clip_eps=0.1,0.2,0.3,0.4"]
    for at_once in (1, 3):
        tune(tmp_path / str(at_once), plan(*space, trials=4, keep_all=True), at_once=at_once)
    one, three = (records(tmp_path / name) for name in ("1", "3"))
    assert one["best"] == three["best"]
    assert [t["results"] for t in one["trials"]] == [t["results"] for t in three["trials"]]
    assert one["finalists"] == three["finalists"]


def test_a_finalist_that_asha_stopped_continues_to_its_end(tmp_path):
    directory = tmp_path / "again"
    made, cfg = plan("ppo.clip_eps=0.1,0.2", trials=2)
    worse_last = sorted(made.trials, key=lambda settings: -settings["ppo.clip_eps"])
    tune(directory, (replace(made, trials=tuple(worse_last)), cfg))
    events = [event["event"] for event in read_records(directory / "events.jsonl") if event.get("run") == "002"]
    assert events.count("stop") == events.count("again") == 1
    assert [trial["outcome"] for trial in records(directory)["trials"]] == ["complete", "complete"]
    assert starts(directory) == {"001": 1, "001-repeat-1": 1, "002": 2, "002-repeat-1": 1}


def test_another_metric_than_the_score_decides(tmp_path):
    directory = tmp_path / "metric"
    tune(directory, plan("ppo.clip_eps=0.1,0.4", trials=2, metric="correct", keep_all=True, seeds=1))
    assert records(directory)["best"]["settings"] == {"ppo.clip_eps": 0.1}  # this source scores the other way


def test_a_second_tuning_in_the_same_directory_is_refused(tmp_path):
    tune(tmp_path / "one", plan("ppo.clip_eps=0.1,0.2", trials=2, seeds=1))
    with pytest.raises(UserError, match="exists; continue it with --resume"):
        tune(tmp_path / "one", plan("ppo.clip_eps=0.1,0.2", trials=2))
    assert os.path.exists(tmp_path / "one/tune.json")
