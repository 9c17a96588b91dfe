"""The steps around every command's work: capacity, run directory, config, leftovers of earlier processes."""

from __future__ import annotations

import gc
import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest

import deploy.session
from common.config.base import RayConfig
from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from common.memory import GIB, MIB
from deploy.plan.needs import Need, needs
from deploy.plan.placement import Node
from deploy.run.directory import run_owner
from deploy.run.lock import is_owned
from deploy.run.resume import resumed_config
from deploy.session import COLLECT_AFTER, rare_full_collections, session, step_grace_s
from tests.deploy.plan.test_capacity import LLAMA_2_7B

TREE = {"prompts": {"train": "t"}, "reward": {"sources": [{"name": "s", "function": "m:f"}]}}
FITS, TOO_LARGE = (Need("Learner(0)", "learner", cpus, 0, {}) for cpus in (1, 3))


@pytest.fixture(autouse=True)
def events(monkeypatch):
    """A cluster of one node with two CPUs, and the order of its events."""
    happened = []

    @contextmanager
    def cluster(cfg, run):
        happened.append("cluster joined")
        yield [Node("n", 2, 0, 10)]
        happened.append("cluster left")

    monkeypatch.setattr(deploy.session, "cluster", cluster)
    return happened


@pytest.fixture
def cfg():
    return Config.model_validate(TREE)


@contextmanager
def started(cfg, run, *phases, resume=False, record=lambda: None):
    """A session of a run directory that this process owns."""
    with (
        run_owner(run, resume=resume) as owned,
        session(cfg, "train", owned, lambda cfg: phases, resume=resume, record=record) as (_, begin),
    ):
        yield begin


def test_a_session_writes_config_and_record_and_then_the_other_entries(cfg, tmp_path, events):
    run = tmp_path / "run"

    def record():
        events.append(f"recorded beside {sorted(path.name for path in run.iterdir())}")

    with started(cfg, run, [FITS], record=record) as begin:
        assert [path.name for path in run.iterdir()] == ["run.lock"]
        begin()
        assert load_config(run / "config.toml", [], Config) == cfg
        assert json.loads((run / "run.json").read_text())["command"] == "train"
        events.append("work")
    assert events == [
        "cluster joined",
        "recorded beside ['config.toml', 'run.json', 'run.lock']",
        "work",
        "cluster left",
    ]


def test_a_resumed_session_records_its_entries_before_it_writes_the_config(cfg, tmp_path):
    with started(cfg, tmp_path, [FITS]) as begin:
        begin()
    steps = []

    def record():
        steps.append(load_config(tmp_path / "config.toml", [], Config).num_steps)

    with started(cfg.model_copy(update={"num_steps": 7}), tmp_path, [FITS], resume=True, record=record) as begin:
        begin()
    assert steps == [cfg.num_steps]
    assert load_config(tmp_path / "config.toml", [], Config).num_steps == 7


def test_a_resumed_run_keeps_its_micro_batches_on_larger_gpus(tmp_path, monkeypatch):
    def phases(cfg):
        return [needs(cfg, LLAMA_2_7B)]

    def trained_with(cfg, *, gib, resume):
        node = Node("n", 9, 8, 128 * GIB, gib * GIB)
        monkeypatch.setattr(deploy.session, "cluster", lambda ray, run: nullcontext([node]))
        with (
            run_owner(tmp_path, resume=resume) as owned,
            session(cfg, "train", owned, phases, trains=LLAMA_2_7B, resume=resume) as (cfg, begin),
        ):
            begin()
        assert load_config(tmp_path / "config.toml", [], Config) == cfg
        return cfg.learner.micro_batch_tokens

    cfg = Config.model_validate({**TREE, "learner": {"gpus": 1, "lora": {}}})
    assert trained_with(cfg, gib=40, resume=False) == 4096  # test_micro_batches.py has the arithmetic
    recorded = resumed_config(Config, tmp_path, [], travels=False)
    assert trained_with(recorded, gib=80, resume=True) == 4096
    again = resumed_config(Config, tmp_path, ["learner.micro_batch_tokens=8192"], travels=False)
    assert trained_with(again, gib=80, resume=True) == 8192


def test_the_refusal_of_a_run_ends_with_the_smallest_change(tmp_path, monkeypatch):
    cfg = Config.model_validate({**TREE, "learner": {"cpus": 7}, "generators": {"kv_cache_mib": 500}})
    monkeypatch.setattr(deploy.session, "cluster", lambda ray, run: nullcontext([Node("n", 6, 0, 300 * GIB)]))

    def start(cfg):
        with run_owner(tmp_path / "run") as owned:
            phases = lambda cfg: [needs(cfg, LLAMA_2_7B)]  # noqa: E731
            with session(cfg, "train", owned, phases, trains=LLAMA_2_7B):
                pass

    with pytest.raises(UserError, match=r"no node has room .*; the smallest change that fits: learner.cpus=3 \(.*\)$"):
        start(cfg)
    start(cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"cpus": 3})}))


def test_an_own_cluster_starts_with_the_smaller_store_of_a_change(cfg, tmp_path, monkeypatch):
    """Of 16 GiB the store takes 8, and the process 10."""
    monkeypatch.setattr(
        deploy.session, "cluster", lambda ray, run: nullcontext([Node("n", 2, 0, 8 * GIB, store=8 * GIB)])
    )

    def phases(cfg):
        return [[Need("Learner(0)", "learner", 1, 0, {"x": 10 * GIB}, store={"rollouts": cfg.buffer_mib * MIB})]]

    cfg = cfg.model_copy(update={"buffer_mib": 8192})
    for address, change in (
        (None, "the smallest change that fits: buffer_mib=4096"),
        ("h:1", "no change of one or two"),
    ):
        there = cfg.model_copy(update={"ray": RayConfig(address=address)})
        with (
            run_owner(tmp_path / "run") as owned,
            pytest.raises(UserError, match=f"no node has room for Learner.*{change}"),
            session(there, "train", owned, phases),
        ):
            pass


def test_an_own_cluster_gets_a_store_for_the_phase_that_needs_most(cfg, tmp_path, monkeypatch):
    stores = []

    def cluster(ray, run):
        stores.append(ray.object_store_mib)
        return nullcontext([Node("n", 9, 0, 64 * GIB)])

    monkeypatch.setattr(deploy.session, "cluster", cluster)
    large = replace(FITS, store={"weights": 3 * GIB})
    with started(cfg, tmp_path / "run", [FITS], [large, FITS]):
        pass
    small = cfg.model_copy(update={"ray": RayConfig(object_store_mib=3000)})
    with (
        pytest.raises(UserError, match=r"object_store_mib \(3000\) must be at least 3072"),
        started(small, tmp_path, [large]),
    ):
        pass
    joining = cfg.model_copy(update={"ray": RayConfig(object_store_mib=3000, address="10.0.0.1:6379")})
    with started(joining, tmp_path / "other", [large]):  # its nodes' stores count, and not this setting
        pass
    assert stores == [3072, 3000]


def test_with_an_autoscaler_only_the_learners_ranks_must_fit_now(cfg, tmp_path):
    wide = replace(TOO_LARGE, name="Generator(0)", section="generators")
    for name, ray in {"its own": RayConfig(autoscaler=True), "fixed": RayConfig(address="h:1")}.items():
        refused = cfg.model_copy(update={"ray": ray})
        with pytest.raises(UserError, match="no node has room"), started(refused, tmp_path / name, [FITS, wide]):
            pass
    growing = cfg.model_copy(update={"ray": RayConfig(autoscaler=True, address="h:1")})
    with started(growing, tmp_path / "started", [FITS, wide]):
        pass
    with (
        pytest.raises(UserError, match=r"no node has room for Learner\(0\)"),
        started(growing, tmp_path / "refused", [TOO_LARGE, wide]),
    ):
        pass


def test_a_directory_is_owned_before_the_cluster_is_joined(cfg, tmp_path, events):
    run = tmp_path / "run"
    with started(cfg, run, [FITS]):
        assert is_owned(run)
        events.clear()
        for resume in (True, False):
            with pytest.raises(UserError, match="another process works in"), started(cfg, run, [FITS], resume=resume):
                pass
    assert events == ["cluster left"]
    assert not is_owned(run)


def test_a_session_deletes_the_scaling_state_and_leftovers_of_an_earlier_process(cfg, tmp_path):
    with started(cfg, tmp_path, [FITS]) as begin:
        begin()
    kept = {"config.toml", "run.json", "run.lock", "metrics.jsonl"}
    for name in ("scale.json", "pool-state.json", "metrics.jsonl", "summary.json.1.tmp"):
        (tmp_path / name).write_text("{}")
    with started(cfg, tmp_path, [FITS], resume=True) as begin:
        # Nothing else is cleaned before the run is accepted.
        assert {path.name for path in tmp_path.iterdir()} == {*kept, "summary.json.1.tmp"}
        begin()
        assert {path.name for path in tmp_path.iterdir()} == kept


def test_every_phase_must_fit_and_a_refused_run_leaves_no_directory(cfg, tmp_path):
    for phases in ([[TOO_LARGE]], [[FITS], [TOO_LARGE]], [[FITS, FITS, FITS]]):
        with pytest.raises(UserError, match="no node has room"), started(cfg, tmp_path / "runs/run", *phases):
            pass
        assert list(tmp_path.iterdir()) == []
    with started(cfg, tmp_path / "run", [FITS, FITS], [FITS]):  # phases follow one another
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
