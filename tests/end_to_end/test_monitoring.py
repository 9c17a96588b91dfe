"""A real Prometheus scrapes a tiny real run through both discovery files, and finds what is declared."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from ray.util.state import list_actors

from actors.membership import STATES
from common.figures import FIGURES
from common.meters import METERS
from deploy.progress import Progress
from deploy.train import run_training
from tests.fakes import save_tiny_model, tiny_config

pytestmark = pytest.mark.ray

Samples = dict[str, list[dict[str, str]]]  # name of a metric to the labels of its series


@pytest.fixture(scope="module")
def prometheus() -> str:
    """The program, from Debian's package if it is not installed: the package needs no root to be unpacked."""
    cache = Path(tempfile.gettempdir()) / f"ratchet-prometheus-{os.getuid()}"
    unpacked = cache / "usr/bin/prometheus"
    if found := shutil.which("prometheus") or (unpacked.exists() and str(unpacked)):
        return found
    cache.mkdir(exist_ok=True)
    try:
        download = partial(subprocess.run, ["apt-get", "download", "prometheus"], cwd=cache, capture_output=True)
        if download(timeout=120).returncode:  # a slim image has no lists of packages
            subprocess.run(["apt-get", "update"], check=True, capture_output=True, timeout=120)
            download(timeout=120, check=True)
        [package] = cache.glob("prometheus_*.deb")
        with tempfile.TemporaryDirectory(dir=cache) as staging:
            subprocess.run(["dpkg", "-x", package, staging], check=True, capture_output=True, timeout=120)
            (Path(staging) / "usr").rename(cache / "usr")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        pytest.skip(f"Prometheus is not installed, and Debian's package cannot be had: {error}")
    return str(unpacked)


@contextmanager
def scraping(program: str, directory: Path, files: list[Path]) -> Iterator[Callable[..., Any]]:
    """A Prometheus over the discovery files; gives a function that asks its HTTP API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    jobs = [{"job_name": f"job{i}", "file_sd_configs": [{"files": [str(path)]}]} for i, path in enumerate(files)]
    config = directory / "prometheus.yml"
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))  # JSON is YAML
    arguments = [f"--config.file={config}", f"--storage.tsdb.path={directory}/data", f"--web.listen-address={address}"]

    def ask(what: str, **parameters: str) -> Any:
        with urlopen(f"http://{address}/api/v1/{what}?{urlencode(parameters)}", timeout=10) as response:
            return json.load(response)["data"]

    with open(directory / "prometheus.log", "wb") as log:
        process = subprocess.Popen([program, *arguments], stdout=log, stderr=log)
    try:
        yield ask
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition: Callable[[], Any], limit_s: float = 60) -> Any:
    """Its first true answer, or its last one."""
    end = time.monotonic() + limit_s
    while True:
        try:
            answer = condition()
        except OSError:  # it does not listen yet
            answer = None
        if answer or time.monotonic() > end:
            return answer
        time.sleep(0.5)


def not_up(targets: list[dict[str, Any]]) -> list[str]:
    return [f"{target['scrapeUrl']}: {target['lastError']}" for target in targets if target["health"] != "up"]


def scrape(program: str, directory: Path, files: list[Path], wanted: set[str]) -> tuple[list[dict[str, Any]], Samples]:
    """The targets, and all series, once every wanted metric is there; or what there is when that takes too long."""
    assert wait_for(lambda: all(path.exists() for path in files)), files
    with scraping(program, directory, files) as ask:
        wait_for(lambda: wanted <= set(ask("label/__name__/values")) and not not_up(ask("targets")["activeTargets"]))
        samples: Samples = {}
        for series in ask("query", query='{__name__=~"(ray_)?ratchet_.*|ray_vllm_.*"}')["result"]:
            labels = series["metric"]
            samples.setdefault(labels.pop("__name__"), []).append(labels)
        return ask("targets")["activeTargets"], samples


def test_prometheus_finds_every_figure_every_meter_and_vllms_own(prometheus, tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="rt") as temporary:  # short: a socket's path has 108 bytes
        monkeypatch.setenv("RAY_TMPDIR", temporary)
        monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
        directory = tmp_path / "run"
        model = save_tiny_model(tmp_path / "model")
        sources = [{"name": "a_words", "function": "tests.tasks:fails_on_some"}]
        cfg = tiny_config(
            model,
            num_steps=2,
            rollouts_per_step=8,
            reward={"sources": sources},
            generators={"min": 2, "cpus": 0.5},
            ray={"dashboard": True},
        )
        exported = {f"ray_{name}{'_count' * (METERS[name].kind == 'histogram')}" for name in METERS}
        figures = {figure.metric for figure in FIGURES} | {"ratchet_policy_version", "ratchet_evaluation_pass_at_1"}
        found: list[Any] = []
        labels_shown: set[tuple[str, str]] = set()
        shown = Progress.step

        def look(self: Progress, record: dict[str, Any], *rest: Any) -> None:
            shown(self, record, *rest)
            if record["step"] + 1 == cfg.num_steps:  # the run waits meanwhile
                labels_shown.update((actor.class_name, actor.repr_name) for actor in list_actors(detail=True))
                files = [Path(temporary) / "ray/prom_metrics_service_discovery.json", directory / "prometheus.json"]
                vllms = {"ray_vllm_generation_tokens_total", "ray_vllm_e2e_request_latency_seconds_count"}
                found.append(scrape(prometheus, tmp_path, files, exported | figures | vllms))

        monkeypatch.setattr(Progress, "step", look)
        run_training(cfg, directory)
    replicas = {"Generator(0)", "Generator(1)", "Reward(0)", "ReferencePolicy(0)"}
    assert labels_shown == {(name.partition("(")[0], name) for name in replicas | {"Learner(0)"}}
    [(targets, samples)] = found
    assert len(targets) >= 2
    assert not_up(targets) == []

    assert figures <= set(samples)
    assert samples["ratchet_rollout_score"][0]["source"] == "a_words"
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
    assert not (directory / "prometheus.json").exists()
