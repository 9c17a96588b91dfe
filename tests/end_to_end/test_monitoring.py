"""A real Prometheus scrapes a tiny real run through both discovery files and finds every declared metric."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.state import list_actors

from actors.pool.replica import STATES
from common.metrics.table import ENDPOINT, METERS, STEP
from deploy.screen.progress import Progress
from deploy.train import run_training
from tests.fakes import save_tiny_model, tiny_config
from tests.prometheus import documented, find_prometheus, scraping, wait_for

pytestmark = pytest.mark.ray

Samples = dict[str, list[dict[str, str]]]  # labels of every series, by the metric's name


def not_up(targets: list[dict[str, Any]]) -> list[str]:
    return [f"{target['scrapeUrl']}: {target['lastError']}" for target in targets if target["health"] != "up"]


def scrape(config: str, directory: Path, wanted: set[str]) -> tuple[list[dict[str, Any]], Samples]:
    """Targets and series, once every wanted metric is there and every target is up, or after a time limit."""
    with scraping(config, directory) as ask:
        wait_for(lambda: wanted <= set(ask("label/__name__/values")) and not not_up(ask("targets")["activeTargets"]))
        samples: Samples = {}
        for series in ask("query", query='{__name__=~"(ray_)?ratchet_.*|ray_vllm_.*"}')["result"]:
            labels = series["metric"]
            samples.setdefault(labels.pop("__name__"), []).append(labels)
        return ask("targets")["activeTargets"], samples


def test_prometheus_finds_every_figure_every_meter_and_vllms_own(tmp_path, monkeypatch):
    """With the configuration of docs/metrics.md."""
    find_prometheus()  # skips before anything starts
    with tempfile.TemporaryDirectory(prefix="rt") as temporary:  # short: a socket's path has 108 bytes
        monkeypatch.setenv("RAY_TMPDIR", temporary)
        monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
        directory = tmp_path / "run"
        model = save_tiny_model(tmp_path / "model")
        sources = [{"name": "a_words", "function": "tests.tasks:fails_on_some"}]
        cfg = tiny_config(
            model,
            num_steps=2,
            evaluation={"pass_source": "a_words"},
            rollouts_per_step=8,
            reward={"sources": sources},
            generators={"min": 2, "cpus": 0.5},
            ray={"dashboard": True},
        )
        exported = {f"ray_{name}{'_count' * (METERS[name].kind == 'histogram')}" for name in METERS}
        figures = {metric.prometheus for metric in (*STEP, *ENDPOINT)}
        figures.remove("ratchet_reward_figure")  # this source gives a score and nothing else
        found: list[Any] = []
        labels_shown: set[tuple[str, str]] = set()
        shown = Progress.step

        def look(self: Progress, record: dict[str, Any], *rest: Any) -> None:
            shown(self, record, *rest)
            if record["step"] + 1 == cfg.num_steps:  # the run waits until this returns
                labels_shown.update(
                    (actor.class_name, actor.repr_name)
                    for actor in list_actors(address=ray.get_runtime_context().gcs_address, detail=True)
                )
                listed = directory / "prometheus-ray.json"
                assert wait_for(listed.exists), f"{os.readlink(listed)} is not there"  # Ray writes it a little later
                vllms = {"ray_vllm_generation_tokens_total", "ray_vllm_e2e_request_latency_seconds_count"}
                found.append(scrape(documented(run=directory), tmp_path, exported | figures | vllms))

        monkeypatch.setattr(Progress, "step", look)
        run_training(cfg, directory)
    replicas = {"Generator(0)", "Generator(1)", "Reward(0)", "ReferencePolicy(0)"}
    assert labels_shown == {(name.partition("(")[0], name) for name in replicas | {"Learner(0)"}}
    [(targets, samples)] = found
    assert len(targets) >= 2
    assert not_up(targets) == []

    assert figures <= set(samples)
    assert samples["ratchet_reward_score"][0]["source"] == "a_words"
    assert all(labels["run"] == "run" for name in figures for labels in samples[name])

    assert exported <= set(samples)
    pools = {name for name in exported if name.startswith("ray_ratchet_pool_")}  # recorded by the driver
    for name in pools:
        assert {labels["role"] for labels in samples[name]} == {"Generator", "Reward", "ReferencePolicy"}
    for name in exported - pools:
        for labels in samples[name]:
            assert labels["replica"] in replicas
            assert labels["role"] == labels["replica"].partition("(")[0]

    def seen(name: str) -> set[str]:
        return {labels["replica"] for labels in samples[name]}

    assert seen("ray_ratchet_generator_requests") == {"Generator(0)", "Generator(1)"}
    assert seen("ray_ratchet_scored_rollouts_total") == {"Reward(0)", "ReferencePolicy(0)"}
    assert seen("ray_ratchet_batch_tokens_count") == {"ReferencePolicy(0)"}
    assert {labels["state"] for labels in samples["ray_ratchet_pool_replicas"]} == set(STATES)
    assert any(name.startswith("ray_vllm_") for name in samples)
    workers = {labels["WorkerId"] for labels in samples["ray_ratchet_generator_weights_version"]}
    assert {labels["WorkerId"] for labels in samples["ray_vllm_generation_tokens_total"]} == workers
    assert not list(directory.glob("prometheus*"))
