"""Shipped configs by name: every command takes the name, and the user can list and copy them."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from common.config.loading import load_config
from common.config.ppo import Config
from deploy.cli import main
from deploy.shipped import config_file
from tests.deploy.test_configs import CONFIGS, ROOTS


@pytest.fixture
def ratchet(monkeypatch, capsys, tmp_path):
    """Runs the command line in an empty directory; gives back exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ratchet", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return call


def test_a_name_is_the_shipped_file_and_anything_else_stays():
    assert config_file("larger") == str(CONFIGS / "larger.toml")
    assert config_file(Path("larger")) == CONFIGS / "larger.toml"
    for other in ("larger.toml", "./larger", "presets/fast", "kl.coef=0", "", None, Path("mine.toml")):
        assert config_file(other) == other


def test_a_command_takes_the_name_of_a_shipped_config(ratchet):
    code, out, _ = ratchet("config", "larger", "kl.coef=0.5")
    assert code == 0
    assert tomllib.loads(out)["kl"]["coef"] == 0.5
    assert tomllib.loads(out)["num_steps"] == load_config(CONFIGS / "larger.toml", [], Config).num_steps


@pytest.mark.parametrize("command", [["train", "larger"], ["train-critic", "larger"], ["evaluate", "larger"]])
def test_a_run_of_a_shipped_config_has_its_name(ratchet, monkeypatch, command):
    found = []
    monkeypatch.setattr("deploy.train.run_training", lambda cfg, directory, **_: found.append(directory))
    monkeypatch.setattr("deploy.train_critic.run_critic_training", lambda cfg, directory, **_: found.append(directory))
    monkeypatch.setattr("deploy.evaluation.command.run_evaluation", lambda cfg, directory, **_: found.append(directory))
    assert ratchet(*command)[0] == 0
    suffix = {"train": "", "train-critic": "-critic", "evaluate": "-evaluation"}[command[0]]
    assert found == [Path(f"runs/larger{suffix}")]


def test_the_list_has_every_shipped_config_with_its_comment(ratchet):
    code, out, _ = ratchet("config", "--list")
    assert code == 0
    names = [line for line in out.splitlines() if not line.startswith(" ")]
    assert names == sorted(name.removesuffix(".toml") for name in ROOTS)
    for file in ROOTS:
        first = (CONFIGS / file).read_text().partition("\n")[0]
        assert first.removeprefix("# ")[:60] in " ".join(out.split())


def test_the_text_of_a_shipped_config_is_its_file(ratchet):
    assert ratchet("config", "reviews", "--text") == (0, (CONFIGS / "reviews.toml").read_text(), "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text"], "name one"),
        (["larger", "--text", "kl.coef=0"], "give no settings"),
        (["mine.toml", "--text"], "mine.toml is no shipped config; ratchet config --list shows"),
    ],
)
def test_text_of_anything_else_is_refused(ratchet, arguments, message):
    code, out, err = ratchet("config", *arguments)
    assert (code, out) == (2, "")
    assert message in err
