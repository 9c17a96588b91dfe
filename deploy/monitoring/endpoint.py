"""The run's figures for Prometheus: an endpoint on this machine, and the file by which a Prometheus finds it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from common.config.base import MonitoringConfig
from common.errors import UserError
from common.figures import FIGURES
from common.files import write_json
from learner.loop.evaluation import Evaluation

DISCOVERY = "prometheus.json"
RAYS_DISCOVERY = "prometheus-ray.json"

_BY_SOURCE = re.compile("reward/[^/]+/[^/]+")


class RunFigures(Collector):
    """The newest step record and evaluation; what was not measured yet is left out."""

    def __init__(self) -> None:
        self._record: Mapping[str, Any] = {}
        self._evaluation: Evaluation | None = None
        self._shared: Path | None = None  # where all runs are listed
        self.address = ""  # HOST:PORT

    def step(self, record: Mapping[str, Any]) -> None:
        self._record = dict(record)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation

    def collect(self) -> Iterator[GaugeMetricFamily]:
        record, evaluation = self._record, self._evaluation  # the loop may replace them meanwhile
        by_source = [(key.split("/")[1:], value) for key, value in record.items() if _BY_SOURCE.fullmatch(key)]
        for figure in FIGURES:
            help_ = f"{figure.key} of RUN/metrics.jsonl: {figure.unit}, {figure.reduced_by}"
            if figure.key == "reward/NAME/score":
                scores = GaugeMetricFamily(figure.metric, help_, labels=["source"])
                for (source, key), value in by_source:
                    if key == "score":
                        scores.add_metric([source], value)
                yield scores
            elif figure.key == "reward/NAME/KEY":
                others = GaugeMetricFamily(figure.metric, help_, labels=["source", "figure"])
                for (source, key), value in by_source:
                    if key != "score":
                        others.add_metric([source, key], value)
                yield others
            elif figure.key in record:
                yield GaugeMetricFamily(figure.metric, help_, value=record[figure.key])
        versions = [record["step"] + 1] if record else []
        if evaluation is not None:
            versions.append(evaluation.policy_version)
            yield GaugeMetricFamily(
                "ratchet_evaluation_score",
                "score of the newest held-out evaluation: reward units, mean over answers",
                value=evaluation.score,
            )
            if evaluation.pass_at_1 is not None:
                yield GaugeMetricFamily(
                    "ratchet_evaluation_pass_at_1",
                    "pass@1 of the newest held-out evaluation: share of prompts",
                    value=evaluation.pass_at_1,
                )
        if versions:
            yield GaugeMetricFamily(
                "ratchet_policy_version", "version that the generators hold: publications", value=max(versions)
            )

    @contextmanager
    def discoverable(self, directory: Path, rays: Path | None = None) -> Iterator[None]:
        """While it lasts, RUN/prometheus.json names the endpoint, as Prometheus' file_sd_configs read it, and
        RUN/prometheus-ray.json is a link to `rays`, Ray's own file of this kind. The directory that the config names
        has both too."""
        run = directory.resolve().name
        places = [(directory / DISCOVERY, directory / RAYS_DISCOVERY)]
        if self._shared is not None:
            unique = f"{run}-{self.address.rpartition(':')[2]}"  # no two runs of a machine have one port
            places.append((self._shared / f"{unique}.json", self._shared / f"{unique}-ray.json"))
        try:
            for own, link in places:
                write_json(own, [{"targets": [self.address], "labels": {"run": run}}])
                link.unlink(missing_ok=True)  # of a run that was killed
                if rays is not None:
                    link.symlink_to(rays)
            yield
        finally:
            for path in (path for pair in places for path in pair):
                path.unlink(missing_ok=True)

    @classmethod
    @contextmanager
    def served(cls, cfg: MonitoringConfig) -> Iterator[RunFigures]:
        """Serves http://127.0.0.1:PORT/metrics until the end. Raises UserError if the port is taken, or the directory
        for discovery files cannot be written."""
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
