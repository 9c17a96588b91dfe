"""`ratchet monitoring`: settings of Prometheus and Grafana that show all runs of a machine. Runs in the driver.

DIRECTORY/prometheus.yml, alerts.yml     which targets to ask, when to warn
DIRECTORY/targets/                       where runs list themselves (`monitoring.discovery`)
DIRECTORY/grafana/grafana.ini            Grafana's own settings: viewers need no login, Ray's dashboard may embed it
DIRECTORY/grafana/provisioning/...       where Grafana finds Prometheus and the dashboards
DIRECTORY/grafana/dashboards/ratchet.json
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from shlex import quote

from common.config.base import WEB_ADDRESS
from common.errors import UserError
from common.files import check_replaces, write_whole
from deploy.monitoring.dashboard import WRITTEN, dashboard

_PROMETHEUS = """\
global:
  scrape_interval: 10s
  evaluation_interval: 10s
rule_files:
  - {alerts}
scrape_configs:
  - job_name: ratchet
    file_sd_configs:
      - files: [{targets}]
        refresh_interval: 10s
"""
_GRAFANA = """\
[server]
http_addr = 127.0.0.1
[security]
allow_embedding = true
[auth.anonymous]
enabled = true
org_role = Viewer
[paths]
provisioning = {directory}/grafana/provisioning
"""
_SOURCE = """\
apiVersion: 1
datasources:
  - name: Prometheus
    type: prometheus
    access: proxy
    url: {prometheus}
    isDefault: true
"""
_DASHBOARDS = """\
apiVersion: 1
providers:
  - name: Ratchet
    folder: Ratchet
    type: file
    options:
      path: {dashboards}
"""


def write_monitoring(directory: Path, prometheus: str) -> None:
    """Writes the files, and replaces the files of an earlier call. `prometheus`: Prometheus' URL, for Grafana."""
    if not re.fullmatch(WEB_ADDRESS, prometheus):
        raise UserError(f"--prometheus ({prometheus}) must be an address such as http://127.0.0.1:9090")
    directory = directory.absolute()
    if re.search(r"[*?\[\\\n]", str(directory)):
        raise UserError(
            f"{directory} has one of * ? [ \\ in it, which Prometheus takes for a pattern; name another path"
        )

    def quoted(name: str) -> str:
        return json.dumps(f"{directory}/{name}", ensure_ascii=False)  # a string of YAML, too

    alerts = Path(__file__).with_name("alerts.yml").read_text(encoding="utf-8")
    settings = {
        "prometheus.yml": _PROMETHEUS.format(alerts=quoted("alerts.yml"), targets=quoted("targets/*.json")),
        "alerts.yml": alerts,
        "grafana/grafana.ini": _GRAFANA.format(directory=directory),
        "grafana/provisioning/datasources/prometheus.yml": _SOURCE.format(prometheus=json.dumps(prometheus)),
        "grafana/provisioning/dashboards/ratchet.yml": _DASHBOARDS.format(dashboards=quoted("grafana/dashboards")),
    }
    texts = {name: f"# {WRITTEN}\n{text}" for name, text in settings.items()}
    texts["grafana/dashboards/ratchet.json"] = json.dumps(dashboard(), indent=2) + "\n"
    try:
        for name in texts:
            check_replaces(directory / name, _beginning(name), "ratchet monitoring", otherwise="another directory")
        (directory / "targets").mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(directory / name, text)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}); name another directory") from None


def _beginning(name: str) -> str:
    """The beginning of each version of this file. JSON has no comments, so a dashboard says it in its description."""
    return f'{{\n  "description": "{WRITTEN}"' if name.endswith(".json") else f"# {WRITTEN}"


def next_commands(directory: Path, prometheus: str) -> str:
    """The commands that use the files, as text for the screen."""
    place = quote(str(directory.absolute()))
    return (
        f"Prometheus: prometheus --config.file={place}/prometheus.yml --storage.tsdb.path={place}/data "
        f"--web.listen-address={prometheus.partition('://')[2]}\n"
        f"Grafana:    grafana server --homepath /usr/share/grafana --config {place}/grafana/grafana.ini\n"
        f"Runs:       ratchet train CONFIG monitoring.discovery={place}/targets ray.prometheus={prometheus} "
        f"ray.grafana=http://127.0.0.1:3000 ray.grafana_dashboards={place}/grafana/dashboards"
    )
