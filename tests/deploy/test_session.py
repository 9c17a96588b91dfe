"""The steps around every command's work: capacity, run directory, config, leftovers of earlier processes."""

from __future__ import annotations

import gc
import json
from contextlib import contextmanager

import pytest

import deploy.session
from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from deploy.capacity import Need, Node
from deploy.run.directory import is_owned
from deploy.session import COLLECT_AFTER, rare_full_collections, session, step_grace_s

TREE = {"prompts": {"train": "t"}, "reward": {"sources": [{"name": "s", "function": "m:f"}]}}
FITS, TOO_LARGE = Need("Learner(0)", "learner", 1, 0, 0), Need("Learner(0)", "learner", 3, 0, 0)


@pytest.fixture(autouse=True)
def events(monkeypatch):
    """A cluster of one node with two CPUs, and the order of its events."""
    happened = []

    @contextmanager
    def cluster(cfg):
        happened.append("cluster joined")
        yield [Node("n", 2, 0, 10)]
        happened.append("cluster left")

    monkeypatch.setattr(deploy.session, "cluster", cluster)
    return happened


@pytest.fixture
def cfg():
    return Config.model_validate(TREE)


def test_a_session_owns_a_directory_with_config_and_record(cfg, tmp_path, events):
    run = tmp_path / "run"
    with session(cfg, "train", run, [FITS]) as begin:
        assert list(run.iterdir()) == []
        begin()
        assert is_owned(run)
        assert load_config(run / "config.toml", [], Config) == cfg
        assert json.loads((run / "run.json").read_text())["command"] == "train"
        events.append("work")
    assert not is_owned(run)
    assert events == ["cluster joined", "work", "cluster left"]


def test_a_session_deletes_the_scaling_state_of_an_earlier_process(cfg, tmp_path):
    with session(cfg, "train", tmp_path, [FITS]) as begin:
        begin()
    for name in ("scale.json", "pool-state.json", "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    with session(cfg.model_copy(update={"num_steps": 7}), "train", tmp_path, [FITS], resume=True) as begin:
        begin()
        assert {path.name for path in tmp_path.iterdir()} == {"config.toml", "run.json", "metrics.jsonl"}
        assert load_config(tmp_path / "config.toml", [], Config).num_steps == 7


def test_every_phase_must_fit_before_the_directory_is_made(cfg, tmp_path):
    for phases in ([[TOO_LARGE]], [[FITS], [TOO_LARGE]], [[FITS, FITS, FITS]]):
        with pytest.raises(UserError, match="no node has room"), session(cfg, "train", tmp_path / "run", *phases):
            pass
        assert not (tmp_path / "run").exists()
    with session(cfg, "train", tmp_path / "run", [FITS, FITS], [FITS]):  # phases follow one another
        pass


def test_a_signal_waits_for_the_step_only_with_on_signal(cfg):
    assert step_grace_s(cfg) == 0
    tree = {**TREE, "checkpoint": {"on_signal": True}, "learner": {"timeout_s": 90}}
    assert step_grace_s(Config.model_validate(tree)) == 90


def test_full_collections_are_rare_only_inside():
    before = gc.get_threshold()
    with rare_full_collections():
        assert gc.get_threshold() == COLLECT_AFTER
        assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
