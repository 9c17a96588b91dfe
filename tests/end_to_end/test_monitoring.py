"""A tiny real run, seen from outside while it lasts: by a real Prometheus with the configuration of `ratchet
monitoring`, through Ray's dashboard, and by TensorBoard and W&B."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import ray
from ray.util.state import list_actors

from actors.pool.replica import STATES
from common.files import read_records
from common.metrics.table import ENDPOINT, METERS, STEP
from deploy.cluster.connection import dashboard as ray_dashboard
from deploy.monitoring.dashboard import dashboard
from deploy.monitoring.installation import write_monitoring
from deploy.screen.progress import Progress
from deploy.train import run_training
from tests.event_files import scalars
from tests.fakes import save_tiny_model, tiny_config
from tests.prometheus import find_prometheus, scraping, wait_for
from tests.wandb_file import history

pytestmark = pytest.mark.ray

Samples = dict[str, list[dict[str, str]]]  # labels of every series, by the metric's name


def not_up(targets: list[dict[str, Any]]) -> list[str]:
    return [f"{target['scrapeUrl']}: {target['lastError']}" for target in targets if target["health"] != "up"]


def unanswered(ask: Callable[..., Any]) -> set[str]:
    """The dashboard's queries that have given no series in the last minutes. A gauge of an idle engine vanishes."""
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    for variable, value in (("$run", ".*"), ("$SessionName", ".*"), ("$__rate_interval", "1m")):
        queries = [query.replace(variable, value) for query in queries]
    return {query for query in queries if not ask("query", query=f"count_over_time(({query})[5m:1s])")["result"]}


def scrape(directory: Path, wanted: set[str]) -> tuple[list[dict[str, Any]], Samples, set[str]]:
    """Targets, series and unanswered queries, once every wanted metric is there, every target is up and every query is
    answered, or after a time limit. Also with the rules of the alerts."""
    config = (directory / "prometheus.yml").read_text().replace("10s", "1s")
    with scraping(config, directory) as ask:
        wait_for(lambda: wanted <= set(ask("label/__name__/values")) and not not_up(ask("targets")["activeTargets"]))
        wait_for(lambda: not unanswered(ask))
        [rules] = ask("rules")["groups"]
        assert {rule["health"] for rule in rules["rules"]} == {"ok"}, rules
        samples: Samples = {}
        for series in ask("query", query='{__name__=~"(ray_)?ratchet_.*|ray_vllm_.*"}')["result"]:
            labels = series["metric"]
            samples.setdefault(labels.pop("__name__"), []).append(labels)
        return ask("targets")["activeTargets"], samples, unanswered(ask)


def jobs_of_the_dashboard() -> list[dict[str, Any]]:
    token = os.environ.get("RAY_AUTH_TOKEN") or Path("~/.ray/auth_token").expanduser().read_text().strip()
    url = f"http://{ray_dashboard()}/api/jobs/"
    with urlopen(Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=30) as answer:
        return json.load(answer)


def test_prometheus_finds_every_figure_every_meter_and_vllms_own(tmp_path, monkeypatch):
    """And so does every query of the Grafana dashboard."""
    find_prometheus()  # skips before anything starts
    with tempfile.TemporaryDirectory(prefix="rt") as temporary:  # short: a socket's path has 108 bytes
        monkeypatch.setenv("RAY_TMPDIR", temporary)
        monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
        monkeypatch.setenv("WANDB_MODE", "offline")
        directory = tmp_path / "run"
        model = save_tiny_model(tmp_path / "model")
        monitoring = tmp_path / "monitoring"
        write_monitoring(monitoring, "http://127.0.0.1:9090")
        sources = [{"name": "a_words", "function": "tests.tasks:words_of_some"}]
        cfg = tiny_config(
            model,
            num_steps=2,
            evaluation={"pass_source": "a_words"},
            rollouts_per_step=8,
            reward={"sources": sources},
            generators={"min": 2, "cpus": 0.5},
            ray={"dashboard": True},
            monitoring={"discovery": str(monitoring / "targets")},
            logging={"sinks": ["tensorboard", "wandb"]},
        )
        exported = {f"ray_{name}{'_count' * (METERS[name].kind == 'histogram')}" for name in METERS}
        figures = {metric.prometheus for metric in (*STEP, *ENDPOINT)}
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
                found.append((*scrape(monitoring, exported | figures | vllms), jobs_of_the_dashboard()))

        monkeypatch.setattr(Progress, "step", look)
        run_training(cfg, directory)
    replicas = {"Generator(0)", "Generator(1)", "Reward(0)", "ReferencePolicy(0)"}
    assert labels_shown == {(name.partition("(")[0], name) for name in replicas | {"Learner(0)"}}
    [(targets, samples, unanswered_queries, jobs)] = found
    assert unanswered_queries == set()
    metadata = {"ratchet_run": str(directory), "ratchet_report": f"file://{directory}/report.html"}
    assert metadata in [job["metadata"] for job in jobs]
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

    records = read_records(directory / "metrics.jsonl")
    scores = [(record["step"], record["rollout/score/mean"]) for record in records]
    assert scalars(directory)["rollout/score/mean"] == [(step, pytest.approx(score)) for step, score in scores]
    assert len(scalars(directory)["evaluation/pass_at_1"]) == 2
    assert wait_for(lambda: len(history(directory)) == 4)  # W&B's own process writes the file
    rows = history(directory)
    assert [row["_step"] for row in rows] == [0, 1, 3, 4]
    assert [(row["step"], row["rollout/score/mean"]) for row in rows[1:3]] == scores
    assert "samples/path" in rows[1]
