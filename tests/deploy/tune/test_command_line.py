"""`ratchet tune` on the command line: what reaches the work, and what is refused."""

from __future__ import annotations

import sys

import pytest

from deploy.cli import main
from deploy.run.directory import sole_owner
from deploy.tune.command import Pace
from tests.deploy.tune.test_search import CONFIG, plan


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The call of the work that a command line leads to."""
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("deploy.tune.command.run_tune", lambda *call, **options: calls.append((*call, options)))
    return calls


@pytest.fixture
def ratchet(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ratchet", "tune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return run


def test_a_new_tuning_has_the_documented_defaults(ratchet, asked):
    assert ratchet(CONFIG, "ppo.clip_eps=0.1,0.2", "kl.coef=0.0..0.1", "--address", "127.0.0.1:6379") == (0, "")
    [(directory, pace, (made, cfg), options)] = asked
    assert (str(directory), pace, options) == ("runs/larger-tune", Pace(None, 1), {"force": False})
    assert (len(made.trials), made.finalists, made.seeds, made.metric) == (12, 2, 3, "pass_at_1")
    assert made.rungs == (2, 6)
    assert cfg.ray.address == "127.0.0.1:6379"


def test_options_of_a_new_tuning_reach_the_plan(ratchet, asked):
    options = "--trials 5 --finalists 3 --seeds 4 --metric score --keep-all --hours 0.5 --at-once 2 --run mine"
    assert ratchet(CONFIG, "kl.coef=0.0..0.1", *options.split()) == (0, "")
    [(directory, pace, (made, _), _)] = asked
    assert (str(directory), pace) == ("mine", Pace(0.5, 2))
    assert (len(made.trials), made.finalists, made.seeds, made.metric, made.rungs) == (5, 3, 4, "score", ())


def test_a_tuning_continues_in_the_directory_it_was_started_from(ratchet, asked, tmp_path, monkeypatch):
    _, cfg = plan("kl.coef=0.0..0.1")
    with sole_owner(tmp_path / "runs/one") as owned:
        owned.begin(cfg, "tune", force=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ratchet("--resume", "../runs/one", "--hours", 2) == (0, "")
    [(directory, pace, new, _)] = asked
    assert (directory.resolve(), pace, new) == (tmp_path / "runs/one", Pace(2, 1), None)
    assert tmp_path.samefile(".")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "runs/one", "--trials", 3], "a tuning that continues (--resume) has its plan; give only --hours"),
        ([CONFIG, "--resume", "runs/one"], "a tuning that continues (--resume) has its plan"),
        ([], "name a config file"),
        ([CONFIG, "kl.coef=0..1", "--hours", "inf"], "Invalid value for '--hours'"),
        ([CONFIG], "name at least one key with several values"),
        (["missing.toml", "kl.coef=1,2"], "config file missing.toml does not exist"),
        ([CONFIG, "kl.coefs=1,2"], "kl.coefs: unknown key; did you mean coef"),
    ],
)
def test_wrong_arguments_are_refused_with_nothing_written(ratchet, asked, tmp_path, arguments, message):
    code, err = ratchet(*arguments)
    assert code == 2
    assert message in err
    assert (asked, list(tmp_path.iterdir())) == ([], [])
