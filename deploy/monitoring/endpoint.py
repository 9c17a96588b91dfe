"""The Prometheus endpoint of a run, and the files that tell Prometheus where it is. Runs in the driver."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from common.config.base import MonitoringConfig
from common.errors import UserError
from common.files import write_json
from common.health.health import RULES, Event
from common.metrics.table import ENDPOINT, STEP
from learner.loop.evaluation import Evaluation

DISCOVERY = "prometheus.json"
RAYS_DISCOVERY = "prometheus-ray.json"

_BY_SOURCE = re.compile("reward/[^/]+/[^/]+")


class RunFigures(Collector):
    """The newest step record and the newest evaluation. A value that was not measured yet is left out."""

    def __init__(self) -> None:
        self._record: Mapping[str, Any] = {}
        self._evaluated: Mapping[str, float] = {}
        self._events: dict[str, Sequence[Event]] = {}  # of the newest step and the newest evaluation
        self._shared: Path | None = None  # the directory that lists all runs
        self.address = ""  # HOST:PORT

    def step(self, record: Mapping[str, Any], events: Sequence[Event] = ()) -> None:
        self._record = {**record, "policy_version": record["step"] + 1}
        self._events = {**self._events, "step": events}

    def evaluation(self, evaluation: Evaluation, events: Sequence[Event] = ()) -> None:
        self._events = {**self._events, "evaluation": events}
        passed = {} if evaluation.pass_at_1 is None else {"evaluation/pass_at_1": evaluation.pass_at_1}
        self._evaluated = {"policy_version": evaluation.policy_version, "evaluation/score": evaluation.score, **passed}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        step, evaluated, events = self._record, self._evaluated, self._events  # the loop may replace them meanwhile
        holding = {event.rule for found in events.values() for event in found}
        values = {**step, **evaluated}
        versions = [found["policy_version"] for found in (step, evaluated) if found]
        if versions:
            values["policy_version"] = max(versions)
        by_source = [(*key.split("/")[1:], value) for key, value in values.items() if _BY_SOURCE.fullmatch(key)]
        for metric in (*STEP, *ENDPOINT):
            name, help_ = metric.prometheus, f"{metric.key}: {metric.unit}, {metric.reduced_by}"
            if metric.key == "reward/NAME/score":
                scores = GaugeMetricFamily(name, help_, labels=["source"])
                for source, key, value in by_source:
                    if key == "score":
                        scores.add_metric([source], value)
                yield scores
            elif metric.key == "reward/NAME/KEY":
                others = GaugeMetricFamily(name, help_, labels=["source", "figure"])
                for source, key, value in by_source:
                    if key != "score":
                        others.add_metric([source, key], value)
                yield others
            elif metric.key == "health":
                rules = GaugeMetricFamily(name, help_, labels=["rule"])
                for rule in RULES if step else ():
                    rules.add_metric([rule], float(rule in holding))
                yield rules
            elif metric.key in values:
                yield GaugeMetricFamily(name, help_, value=values[metric.key])

    @contextmanager
    def discoverable(self, directory: Path, rays: Path | None = None) -> Iterator[None]:
        """During the block, RUN/prometheus.json names the endpoint for Prometheus' file_sd_configs, and
        RUN/prometheus-ray.json links to `rays`, the file of the same kind that Ray writes. The directory of
        `monitoring.discovery` gets both too."""
        resolved = directory.resolve()
        run = resolved.name
        places = [(directory / DISCOVERY, directory / RAYS_DISCOVERY)]
        if self._shared is not None:
            # The same for all drivers of the run: a killed one leaves its files, and the next one replaces them.
            unique = f"{run}-{hashlib.sha256(os.fsencode(resolved)).hexdigest()[:12]}"
            places.append((self._shared / f"{unique}.json", self._shared / f"{unique}-ray.json"))
        try:
            for own, link in places:
                write_json(own, [{"targets": [self.address], "labels": {"run": run}}])
                link.unlink(missing_ok=True)  # left by a run that was killed
                if rays is not None:
                    link.symlink_to(rays)
            yield
        finally:
            for path in (path for pair in places for path in pair):
                path.unlink(missing_ok=True)

    @classmethod
    @contextmanager
    def served(cls, cfg: MonitoringConfig) -> Iterator[RunFigures]:
        """Serves http://127.0.0.1:PORT/metrics during the block. Raises UserError if the port is taken or the directory
        of `monitoring.discovery` cannot be written."""
        figures, registry = cls(), CollectorRegistry()
        if cfg.discovery is not None:
            figures._shared = _writable(Path(cfg.discovery).expanduser())
        registry.register(figures)
        try:
            server, thread = start_http_server(cfg.port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise UserError(
                f"monitoring.port ({cfg.port}) cannot be served on 127.0.0.1 ({error.strerror}); name another, or 0 "
                "for any free one"
            ) from None
        figures.address = f"127.0.0.1:{server.server_port}"
        try:
            yield figures
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _writable(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"monitoring.discovery ({directory}) cannot be written ({error.strerror}); name a directory of your own, "
            "or leave it out"
        ) from None
    return directory
