"""A tiny real run, seen from outside while it lasts: by a real Prometheus with the configuration of `ratchet
monitoring`, through Ray's dashboard, and by TensorBoard and W&B."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from tests.metrics_tables import ENVIRONMENT, OPTIONAL
from tests.prometheus import find_prometheus, free_address, scraping, wait_for
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
    queries = [query for query in queries if query.partition("{")[0] not in NOT_OF_THIS_RUN]
    return {query for query in queries if not ask("query", query=f"count_over_time(({query})[5m:1s])")["result"]}


def scraped(ask: Callable[..., Any], wanted: set[str]) -> tuple[list[dict[str, Any]], Samples, set[str]]:
    """Targets, series and unanswered queries, once every wanted metric is there, every target is up and every query is
    answered, or after a time limit."""
    wait_for(lambda: wanted <= set(ask("label/__name__/values")) and not not_up(ask("targets")["activeTargets"]))
    wait_for(lambda: not unanswered(ask))
    samples: Samples = {}
    for series in ask("query", query='{__name__=~"(ray_)?ratchet_.*|ray_vllm_.*"}')["result"]:
        labels = series["metric"]
        samples.setdefault(labels.pop("__name__"), []).append(labels)
    return ask("targets")["activeTargets"], samples, unanswered(ask)


def ask_ray(what: str) -> Any:
    """The answer of Ray's dashboard."""
    token = os.environ.get("RAY_AUTH_TOKEN") or Path("~/.ray/auth_token").expanduser().read_text().strip()
    url = f"http://{ray_dashboard()}/api/{what}"
    with urlopen(Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=30) as answer:
        return json.load(answer)


@dataclass
class Seen:
    """What was seen from outside after the last step, while the run waited."""

    directory: Path
    actors: set[tuple[str, str]]  # class and name in Ray's dashboard
    targets: list[dict[str, Any]]
    samples: Samples
    unanswered: set[str]  # queries of the Grafana dashboard
    rules: list[dict[str, Any]]
    jobs: list[dict[str, Any]]
    prometheus_health: str  # in Ray's dashboard


EXPORTED = {f"ray_{name}{'_count' * (METERS[name].kind == 'histogram')}" for name in METERS}
OF_OTHER_RUNS = OPTIONAL - ENVIRONMENT | {"environment/tool_calls", "environment/failed_calls"}  # it has no tools
FIGURES = {metric.prometheus for metric in (*STEP, *ENDPOINT) if metric.key not in OF_OTHER_RUNS}
NOT_OF_THIS_RUN = {metric.prometheus for metric in STEP if metric.key in OF_OTHER_RUNS}
VLLMS = {"ray_vllm_generation_tokens_total", "ray_vllm_e2e_request_latency_seconds_count"}
REPLICAS = {"Generator(0)", "Generator(1)", "Environments(0)", "Reward(0)", "ReferencePolicy(0)"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Iterator[Seen]:
    """A run of two steps with two generators, an environment and all trackers."""
    find_prometheus()  # skips before anything starts
    tmp_path = tmp_path_factory.mktemp("monitoring")
    directory, monitoring, prometheus = tmp_path / "run", tmp_path / "monitoring", free_address()
    write_monitoring(monitoring, f"http://{prometheus}")
    cfg = tiny_config(
        save_tiny_model(tmp_path / "model"),
        num_steps=2,
        evaluation={"pass_source": "a_words"},
        rollouts_per_step=8,
        environment={"function": "tests.environments:AWords", "max_tokens": 40},
        sampling={"max_new_tokens": 4},
        reward={"sources": [{"name": "a_words", "function": "tests.tasks:words_of_some"}]},
        generators={"min": 2, "cpus": 0.5},
        ray={"dashboard": True, "prometheus": f"http://{prometheus}"},
        monitoring={"discovery": str(monitoring / "targets")},
        logging={"sinks": ["tensorboard", "wandb"]},
    )
    found: list[Seen] = []
    shown = Progress.step

    def look(self: Progress, record: dict[str, Any], *rest: Any) -> None:
        shown(self, record, *rest)
        if record["step"] + 1 < cfg.num_steps:
            return
        actors = list_actors(address=ray.get_runtime_context().gcs_address, detail=True)
        listed = directory / "prometheus-ray.json"
        assert wait_for(listed.exists), f"{os.readlink(listed)} is not there"  # Ray writes it a little later
        targets, samples, unanswered = scraped(ask, EXPORTED | FIGURES | VLLMS)
        found.append(
            Seen(
                directory,
                {(actor.class_name, actor.repr_name) for actor in actors},
                targets,
                samples,
                unanswered,
                ask("rules")["groups"][0]["rules"],
                ask_ray("jobs/"),
                ask_ray("prometheus_health")["msg"],
            )
        )

    config = (monitoring / "prometheus.yml").read_text().replace("10s", "1s")
    with (
        tempfile.TemporaryDirectory(prefix="rt") as temporary,  # short: a socket's path has 108 bytes
        pytest.MonkeyPatch.context() as patch,
        scraping(config, monitoring, prometheus) as ask,
    ):
        patch.setenv("RAY_TMPDIR", temporary)
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        # Ray's autoscaler exports at one fixed port. The Ray of another test process may hold it, and end meanwhile.
        patch.setenv("AUTOSCALER_METRIC_PORT", free_address().rpartition(":")[2])
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(Progress, "step", look)
        run_training(cfg, directory)
        yield found[0]
    import wandb

    wandb.teardown()  # it remembers the variables of its first use


def test_every_process_has_its_name_in_rays_dashboard(seen):
    assert seen.actors == {(name.partition("(")[0], name) for name in REPLICAS | {"Learner(0)"}}


def test_the_job_in_rays_dashboard_names_run_and_report(seen):
    report = f"file://{seen.directory}/report.html"
    metadata = {"ratchet_run": str(seen.directory), "job_name": "ratchet run", "report": report}
    assert metadata in [job["metadata"] for job in seen.jobs]


def test_rays_dashboard_finds_the_prometheus_that_is_named(seen):
    assert seen.prometheus_health == "prometheus running"


def test_every_query_of_the_grafana_dashboard_is_answered(seen):
    assert seen.unanswered == set()
    assert {rule["health"] for rule in seen.rules} == {"ok"}


def test_prometheus_finds_every_figure_of_the_run(seen):
    assert len(seen.targets) >= 2
    assert not_up(seen.targets) == []
    assert set(seen.samples) >= FIGURES
    assert seen.samples["ratchet_reward_score"][0]["source"] == "a_words"
    assert seen.samples["ratchet_reward_figure"][0]["figure"] == "words"
    assert all(labels["run"] == "run" for name in FIGURES for labels in seen.samples[name])
    assert not list(seen.directory.glob("prometheus*"))  # the run has ended


def test_prometheus_finds_every_meter_and_vllms_own(seen):
    samples = seen.samples
    assert set(samples) >= EXPORTED
    pools = {name for name in EXPORTED if name.startswith("ray_ratchet_pool_")}  # recorded by the driver
    for name in pools:
        assert {labels["role"] for labels in samples[name]} == {name.partition("(")[0] for name in REPLICAS}
    for name in EXPORTED - pools:
        for labels in samples[name]:
            if "replica" not in labels:  # the driver counts episodes whose processes died
                assert (name, labels["reason"]) == ("ray_ratchet_environment_voids_total", "died")
                continue
            assert labels["replica"] in REPLICAS
            assert labels["role"] == labels["replica"].partition("(")[0]

    def replicas(name: str) -> set[str]:
        return {labels["replica"] for labels in samples[name]}

    assert replicas("ray_ratchet_generator_requests") == {"Generator(0)", "Generator(1)"}
    assert replicas("ray_ratchet_scored_rollouts_total") == {"Reward(0)", "ReferencePolicy(0)"}
    assert replicas("ray_ratchet_batch_tokens_count") == {"ReferencePolicy(0)"}
    assert {labels["state"] for labels in samples["ray_ratchet_pool_replicas"]} == set(STATES)
    workers = {labels["WorkerId"] for labels in samples["ray_ratchet_generator_weights_version"]}
    assert {labels["WorkerId"] for labels in samples["ray_vllm_generation_tokens_total"]} == workers


def test_tensorboard_and_wandb_have_every_step_and_evaluation(seen):
    records = read_records(seen.directory / "metrics.jsonl")
    scores = [(record["step"], record["rollout/score/mean"]) for record in records]
    assert scalars(seen.directory)["rollout/score/mean"] == [(step, pytest.approx(score)) for step, score in scores]
    assert len(scalars(seen.directory)["evaluation/pass_at_1"]) == 2
    assert wait_for(lambda: len(history(seen.directory)) == 4)  # W&B's own process writes the file
    rows = history(seen.directory)
    assert [row["_step"] for row in rows] == [0, 1, 3, 4]
    assert [(row["step"], row["rollout/score/mean"]) for row in rows[1:3]] == scores
    assert "samples/path" in rows[1]
