"""The page of a tuning: every trial with its curve and its end, the finalists, and the keys with intervals."""

from __future__ import annotations

import pytest

from common.errors import UserError
from deploy import cli
from deploy.report.report import tuning_blocks
from deploy.report.tuning import tuning_of
from tests.deploy.report.conftest import data_of
from tests.deploy.report.made_tuning import AT_END, AT_RUNG, REPEATS, RUNG, STEPS, write_tuning


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tunings") / "tune"
    write_tuning(directory)
    return directory


@pytest.fixture(scope="module")
def found(directory):
    return tuning_of(directory)


def test_every_trial_has_its_curve_and_how_it_ended(found):
    assert [trial["ended"] for trial in found["trials"]] == ["failed", "health", "asha", "asha", "complete", "complete"]
    for trial in found["trials"]:
        number = trial["trial"]
        end = [[STEPS, AT_END[number]]] if number in AT_END else []
        assert trial["curve"] == [[0, 0.05], [RUNG, AT_RUNG[number]], *end]
        assert trial["seed"] == 7
    assert found["trials"][0]["settings"] == "ppo.clip_eps=0.1 optimizer.learning_rate=1e-05"
    assert found["trials"][1]["why"] == "below the best third"
    assert [trial["place"] for trial in found["trials"]] == [None, None, None, None, 1, 0]


def test_finalists_come_with_the_mean_of_their_seeds(found):
    assert [one["trial"] for one in found["finalists"]] == [6, 5]
    for one in found["finalists"]:
        values = [AT_END[one["trial"]], REPEATS[one["trial"]]]
        assert one["values"] == values
        assert one["mean"] == pytest.approx(sum(values) / 2)
    assert [(run["trial"], run["seed"], run["curve"]) for run in found["repeats"]] == [
        (trial, 8, [[STEPS, value]]) for trial, value in REPEATS.items()
    ]
    assert found["best"] == found["trials"][5]["settings"]
    assert found["missing"] == 0


def test_keys_have_their_effects_at_the_rung_with_intervals(found):
    """At the rung no trial was chosen by its outcome. Means of 0.2 and 0.6: the choice decides nearly everything."""
    keys = {key["key"]: key for key in found["sensitivity"]["keys"]}
    assert found["sensitivity"]["title"].startswith(f"how much each key mattered: 6 trials at step {RUNG}")
    clip, rate = keys["ppo.clip_eps"], keys["optimizer.learning_rate"]
    assert [(text, mean) for text, (mean, *_) in clip["means"]] == [
        ("0.1", pytest.approx(0.2)),
        ("0.2", pytest.approx(0.6)),
    ]
    reach = 4.303 * 0.1 / 3**0.5  # Student's t with two degrees of freedom
    for _, (mean, low, high) in clip["means"]:
        assert (low, high) == pytest.approx((mean - reach, mean + reach), abs=1e-3)
    # R2 of the choice: 1 - 0.04 / 0.28, adjusted for two coefficients of six trials.
    assert clip["explained"][0] == pytest.approx(1 - (0.04 / 0.28) * 5 / 4, abs=1e-3)
    assert rate["log"]
    assert rate["points"] == [
        [10.0**-power, AT_RUNG[trial], trial] for trial, power in zip(AT_RUNG, (5, 4, 3, 5, 4, 3), strict=True)
    ]


def test_a_tuning_that_was_cut_shows_what_there_is(tmp_path):
    write_tuning(tmp_path)
    lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "events.jsonl").write_text(
        "".join(lines[:7]) + lines[7][:20]
    )  # a kill while it wrote how trial 2 ended
    blocks = tuning_blocks(tmp_path)
    assert blocks["run"]["state"] == "stopped"
    assert [trial["ended"] for trial in blocks["tuning"]["trials"]] == ["failed", *["not begun"] * 5]
    assert blocks["tuning"]["sensitivity"]["keys"] == []
    assert [one["trial"] for one in blocks["tuning"]["finalists"]] == [2]
    assert blocks["tuning"]["reason"].startswith("no trial is complete, and trial 2 has done the most steps so far: ")
    (tmp_path / "events.jsonl").write_text('{"event": "result"}\n')
    with pytest.raises(UserError, match=r'ratchet tune has not written \({"event": "result"}\); restore'):
        tuning_of(tmp_path)


def test_the_command_writes_the_page_of_a_tuning(directory, found, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ratchet", "report", str(directory)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("6 trials, 2 finalists; ")
    values = data_of((directory / "report.html").read_text())
    assert values["run"]["tabs"] == ["tuning"]
    assert values["tuning"] == {**found, "hours": values["tuning"]["hours"]}
