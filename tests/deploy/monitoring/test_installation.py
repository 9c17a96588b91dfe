"""`ratchet monitoring` writes a configuration that Prometheus accepts, and alerts that fire when they should."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml

from common.errors import UserError
from deploy.monitoring.dashboard import dashboard
from deploy.monitoring.installation import next_commands, write_monitoring
from tests.prometheus import find_prometheus

PROMETHEUS = "http://127.0.0.1:9090"


def test_the_files_name_each_other(tmp_path):
    directory = tmp_path / "with a space"
    write_monitoring(directory, "http://127.0.0.1:9191")
    write_monitoring(directory, "http://127.0.0.1:9191")  # again, over the old ones
    config = yaml.safe_load((directory / "prometheus.yml").read_text())
    assert config["rule_files"] == [f"{directory}/alerts.yml"]
    assert config["scrape_configs"][0]["file_sd_configs"][0]["files"] == [f"{directory}/targets/*.json"]
    provisioning = directory / "grafana/provisioning"
    assert f"provisioning = {provisioning}\n" in (directory / "grafana/grafana.ini").read_text()
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9191")
    [provider] = yaml.safe_load((provisioning / "dashboards/ratchet.yml").read_text())["providers"]
    assert provider["options"]["path"] == f"{directory}/grafana/dashboards"
    assert json.loads((directory / "grafana/dashboards/ratchet.json").read_text()) == dashboard()
    assert f"monitoring.discovery='{directory}'/targets" in next_commands(directory, PROMETHEUS)


def test_prometheus_accepts_the_configuration_and_the_rules(tmp_path):
    promtool = find_prometheus() / "promtool"
    write_monitoring(tmp_path, PROMETHEUS)
    checked = subprocess.run([promtool, "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "7 rules found" in checked.stdout


@pytest.mark.parametrize("url", ["127.0.0.1:9090", "http://user:secret@host:9090", "ftp://host", "http://a b"])
def test_an_address_that_is_none_is_refused_and_nothing_written(tmp_path, url):
    with pytest.raises(UserError, match="must be an address such as http://127"):
        write_monitoring(tmp_path / "new", url)
    assert not (tmp_path / "new").exists()


OTHERS = {
    "prometheus.yml": "scrape_configs:\n  - job_name: ratchet\n",  # as docs/monitoring.md says
    "alerts.yml": "groups: []\n",
    "grafana/grafana.ini": "[server]\n",
    "grafana/provisioning/datasources/prometheus.yml": "apiVersion: 1\n",
    "grafana/provisioning/dashboards/ratchet.yml": "apiVersion: 1\n",
    "grafana/dashboards/ratchet.json": '{\n  "uid": "ratchet",\n',
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_no_earlier_call_has_written_is_kept(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(OTHERS[name])
    with pytest.raises(UserError, match=rf"{name} does not begin like the files that ratchet monitoring writes"):
        write_monitoring(tmp_path, PROMETHEUS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == OTHERS[name]


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_an_earlier_call_are_replaced_also_if_one_is_missing(tmp_path, name):
    write_monitoring(tmp_path, PROMETHEUS)
    whole = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert whole.keys() == {tmp_path / other for other in OTHERS}
    (tmp_path / name).unlink()
    write_monitoring(tmp_path, PROMETHEUS)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == whole


def test_a_path_that_prometheus_takes_for_a_pattern_is_refused(tmp_path):
    with pytest.raises(UserError, match="takes for a pattern"):
        write_monitoring(tmp_path / "a*b", PROMETHEUS)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_monitoring(tmp_path / "file", PROMETHEUS)


def series(name: str, values: str) -> dict[str, str]:
    return {"series": name, "values": values}


def pool(session: str, *, ready: str, joins: str) -> list[dict[str, str]]:
    """The pool of reward replicas of a Ray cluster."""
    return [
        series(f'ray_ratchet_pool_replicas{{SessionName="{session}",role="Reward",state="ready"}}', ready),
        series(f'ray_ratchet_pool_joins_total{{SessionName="{session}",role="Reward"}}', joins),
    ]


def deaths(session: str, reason: str, values: str) -> dict[str, str]:
    labels = f'SessionName="{session}",role="Generator",reason="{reason}"'
    return series(f"ray_ratchet_pool_leaves_total{{{labels}}}", values)


PHASES = [series(f'ratchet_time_{phase}_s{{run="a"}}', f"{s}x60") for phase, s in
          (("generate", "60+0"), ("score", "0+0"), ("learn", "20+0"), ("publish", "4+0"))]  # fmt: skip
# Alert: series that trigger it (a value each minute), series that look alike and do not, and when it fires (minute).
# It does not fire two minutes earlier.
CASES = {
    "RatchetUnhealthy": (
        [series('ratchet_health{run="a",rule="kl_exploding"}', "0 1 1")],
        [series('ratchet_health{run="a",rule="kl_exploding"}', "0 0 0")],
        2,
    ),
    "RatchetNotAnswering": (
        [series('up{job="ratchet",run="a"}', "1 0 0 0")],
        [series('up{job="ratchet",run="a"}', "1 0 1 0"), series('up{job="ray"}', "0 0 0 0")],
        3,
    ),
    # 600 s and five times 84 s: 1020 s, so the step of second 0 is too old after 17 minutes.
    "RatchetNoStep": (
        [series('ratchet_time{run="a"}', "0+0x60"), *PHASES],
        [series('ratchet_time{run="a"}', "0+60x60"), *PHASES],
        18,
    ),
    "RatchetRewardVoids": (
        [series('ray_ratchet_reward_voids_total{source="judge",replica="Reward(0)"}', "0 0 0 1 1")],
        [series('ray_ratchet_reward_voids_total{source="judge",replica="Reward(0)"}', "3 3 3 3 3")],
        4,
    ),
    "RatchetNotFinite": (
        [series('ray_ratchet_generator_nonfinite_total{replica="Generator(0)"}', "0 0 0 1 1")],
        [series('ray_ratchet_generator_nonfinite_total{replica="Generator(0)"}', "0 0 0 0 0")],
        4,
    ),
    "RatchetNoReplica": (
        [*pool("a", ready="1 0 0 0", joins="1 1 1 1"), *pool("b", ready="1 1 1 1", joins="1 1 1 1")],
        [
            *pool("a", ready="0 0 0 0", joins="0 0 0 0"),  # it starts
            *pool("b", ready="1 1 1 1", joins="1 1 1 1"),
            series('ray_ratchet_pool_replicas{SessionName="b",role="Reward",state="starting"}', "0 0 0 0"),
        ],
        3,
    ),
    "RatchetReplicasDie": (
        [
            deaths("a", "died", "0 0 1 1 2 5"),
            deaths("b", "died", "0 0 0 0 0 0"),
        ],
        [deaths("a", "scale", "0 1 2 3 4 5"), deaths("b", "died", "0 0 0 0 0 2"), deaths("c", "died", "0 0 0 0 0 2")],
        5,
    ),
}


def test_each_alert_fires_on_its_cause_and_not_on_a_series_that_looks_alike(tmp_path):
    promtool = find_prometheus() / "promtool"
    write_monitoring(tmp_path, PROMETHEUS)
    rules = yaml.safe_load((tmp_path / "alerts.yml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == set(CASES)
    groups = [
        {
            "interval": "1m",
            "name": f"{alert} {'fires' if fires else 'does not fire'}",
            "input_series": given,
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})',
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": "{}", "value": 1}] if fires and minute == minutes else [],
                }
                for minute in (minutes - 2, minutes)
            ],
        }
        for alert, (cause, alike, minutes) in CASES.items()
        for fires, given in ((True, cause), (False, alike))
    ]
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": groups}))
    tested = subprocess.run([promtool, "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr
