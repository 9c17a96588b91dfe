"""The endpoint of a run's figures, value by value over HTTP, and the file by which it is found."""

from __future__ import annotations

import hashlib
import json
import socket
from contextlib import ExitStack
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.config.base import MonitoringConfig
from common.errors import UserError
from common.health.health import RULES, Event
from common.metrics.table import STEP
from deploy.monitoring.endpoint import RunFigures
from learner.loop.evaluation import Evaluation
from tests.prometheus import documented, find_prometheus, scraping, wait_for


def evaluation(version: int, pass_at_1: float | None) -> Evaluation:
    return Evaluation(version, 4, 0, "", pass_at_1, (0.0, 1.0), 0.5, {}, 0.0, 1.0, 1.0, 1.0)


def scrape(directory) -> dict:
    """Every sample but those of the endpoint's own, found through the discovery file."""
    [group] = json.loads((directory / "prometheus.json").read_text())
    [target] = group["targets"]
    assert target.startswith("127.0.0.1:")
    with urlopen(f"http://{target}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_nothing_is_shown_before_it_is_measured_and_then_the_newest(tmp_path):
    with RunFigures.served(MonitoringConfig()) as figures, figures.discoverable(tmp_path):
        assert scrape(tmp_path) == {}
        figures.evaluation(evaluation(0, 0.25))
        evaluated = {("ratchet_evaluation_score",): 0.5, ("ratchet_evaluation_pass_at_1",): 0.25}
        assert scrape(tmp_path) == {**evaluated, ("ratchet_policy_version",): 0}
        figures.step({"step": 0, "kl/coef": 0.1, "rollout/score/mean": -1.5, "reward/my-judge/score": 7.0})
        figures.step(
            {
                "step": 1,
                "kl/coef": 0.3,
                "rollout/score/std": 2.5,
                "reward/my-judge/score": 8.0,
                "reward/mean/std": 0.5,
                "reward/running_mean": 4.0,
            }
        )
        assert scrape(tmp_path) == {
            **evaluated,
            ("ratchet_policy_version",): 2,  # two updates done
            ("ratchet_step",): 1,
            ("ratchet_kl_coef",): 0.3,
            ("ratchet_rollout_score_std",): 2.5,
            ("ratchet_reward_score", "my-judge"): 8.0,
            ("ratchet_reward_figure", "std", "mean"): 0.5,  # figure, source
            ("ratchet_reward_running_mean",): 4.0,
            **{("ratchet_health", rule): 0 for rule in RULES},
        }
        figures.evaluation(evaluation(2, 0.75))
        assert scrape(tmp_path)[("ratchet_evaluation_pass_at_1",)] == 0.75
        figures.evaluation(evaluation(2, None))
        assert ("ratchet_evaluation_pass_at_1",) not in scrape(tmp_path)


def test_each_health_rule_is_1_while_it_holds(tmp_path):
    def holding() -> set[str]:
        found = {name[1]: value for name, value in scrape(tmp_path).items() if name[0] == "ratchet_health"}
        assert set(found.values()) <= {0, 1}
        assert found.keys() == RULES.keys()
        return {rule for rule, value in found.items() if value}

    event, judged = Event("kl_negative", "", "", news=False), Event("judge_falls", "", "")
    with RunFigures.served(MonitoringConfig()) as figures, figures.discoverable(tmp_path):
        figures.evaluation(evaluation(0, None), [judged])
        figures.step({"step": 0}, [event])
        assert holding() == {"kl_negative", "judge_falls"}
        figures.step({"step": 1, "health": ["kl_negative"]}, [])
        assert holding() == {"judge_falls"}
        figures.evaluation(evaluation(2, None), [])
        assert holding() == set()


def test_every_figure_of_a_record_comes_out_under_its_own_name(tmp_path):
    record = {f.key.replace("NAME", "exact").replace("KEY", "ok"): index for index, f in enumerate(STEP)}
    with RunFigures.served(MonitoringConfig()) as figures, figures.discoverable(tmp_path):
        figures.step(record)
        found = {name: value for name, value in scrape(tmp_path).items() if name[0] != "ratchet_health"}
    assert found.pop(("ratchet_policy_version",)) == 1
    assert sorted(found.values()) == list(range(len(STEP)))
    assert found[("ratchet_wait_learner_s",)] == record["wait/learner_s"]
    assert found[("ratchet_reward_score", "exact")] == record["reward/exact/score"]


def test_the_discovery_file_exists_only_while_the_run_lasts(tmp_path):
    directory = tmp_path / "my-run"
    directory.mkdir()
    with RunFigures.served(MonitoringConfig()) as figures:
        with figures.discoverable(directory):
            [group] = json.loads((directory / "prometheus.json").read_text())
            assert group["labels"] == {"run": "my-run"}
        assert list(directory.iterdir()) == []
        with pytest.raises(KeyError), figures.discoverable(directory):
            raise KeyError
        assert list(directory.iterdir()) == []


def test_a_chosen_port_is_served_on_loopback_and_free_afterwards(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for _ in range(2):
        with RunFigures.served(MonitoringConfig(port=port)) as figures, figures.discoverable(tmp_path):
            assert f'"127.0.0.1:{port}"' in (tmp_path / "prometheus.json").read_text()


def test_a_port_that_is_taken_is_the_users_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"monitoring.port \({port}\) cannot be served"):
            RunFigures.served(MonitoringConfig(port=port)).__enter__()


def test_a_shared_directory_lists_the_runs_that_are_running(tmp_path):
    rays = tmp_path / "session/prom_metrics_service_discovery.json"  # Ray writes it a little later
    run, shared = tmp_path / "my-run", tmp_path / "new/discovery"
    run.mkdir()
    with RunFigures.served(MonitoringConfig(discovery=str(shared))) as figures:
        name = f"my-run-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]}"
        shared.joinpath(f"{name}-ray.json").symlink_to("what a killed run left")
        with figures.discoverable(run, rays):
            own = json.loads((run / "prometheus.json").read_text())
            assert json.loads((shared / f"{name}.json").read_text()) == own
            assert {path.name for path in shared.iterdir()} == {f"{name}.json", f"{name}-ray.json"}
            for link in (run / "prometheus-ray.json", shared / f"{name}-ray.json"):
                assert link.readlink() == rays
        assert list(run.iterdir()) == list(shared.iterdir()) == []


def test_a_run_that_continues_replaces_the_file_of_its_killed_driver(tmp_path):
    shared, runs = tmp_path / "shared", [tmp_path / "a/run", tmp_path / "b/run"]
    cfg, targets = MonitoringConfig(discovery=str(shared)), []
    with ExitStack() as serving:
        for number, run in enumerate([*runs, runs[0]]):
            run.mkdir(parents=True, exist_ok=True)
            figures = serving.enter_context(RunFigures.served(cfg))
            serving.enter_context(figures.discoverable(run))  # the first driver of runs[0] never removes its files
            targets.append(figures.address)
            assert len(list(shared.iterdir())) == min(2, number + 1)
        listed = [json.loads(path.read_text())[0] for path in shared.iterdir()]
    assert sorted(group["targets"][0] for group in listed) == sorted(targets[1:])  # each run its newest port
    assert [group["labels"] for group in listed] == [{"run": "run"}] * 2


def test_a_shared_directory_that_cannot_be_made_is_the_users_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"monitoring.discovery \(.*file/below\) cannot be written \(Not a directory\)"):
        RunFigures.served(MonitoringConfig(discovery=str(tmp_path / "file/below"))).__enter__()


def test_prometheus_with_the_documented_configuration_finds_every_run(tmp_path):
    """A real one: one run by its directory, two by a shared directory, and Ray's file through the first one's link."""
    find_prometheus()
    shared, rays = tmp_path / "discovery", tmp_path / "rays.json"
    with ExitStack() as serving:
        for number, discovery in enumerate([None, str(shared), str(shared)]):
            directory = tmp_path / f"run{number}"
            directory.mkdir()
            figures = serving.enter_context(RunFigures.served(MonitoringConfig(discovery=discovery)))
            figures.step({"step": number})
            serving.enter_context(figures.discoverable(directory, None if discovery else rays))
        elsewhere = serving.enter_context(RunFigures.served(MonitoringConfig()))
        elsewhere.step({"step": 7})
        rays.write_text(json.dumps([{"targets": [elsewhere.address], "labels": {"job": "ray"}}]))  # as Ray writes it
        config = documented(run=tmp_path / "run0", discovery=shared)
        with scraping(config, tmp_path) as ask:
            wait_for(lambda: len(ask("query", query="ratchet_step")["result"]) == 4)
            found = {
                (series["metric"]["job"], series["metric"].get("run")): series["value"][1]
                for series in ask("query", query="ratchet_step")["result"]
            }
    runs = {("ratchet", f"run{number}"): str(number) for number in range(3)}
    assert found == {**runs, ("ray", None): "7"}, (tmp_path / "prometheus.log").read_text()
