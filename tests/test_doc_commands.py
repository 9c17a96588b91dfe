"""Every command in README, CONTRIBUTING and docs: the real command line accepts it, and a test runs what it does.

Here the work behind a command is replaced. The tests of WORK do that work; the commands of OTHER need what no test has.
"""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from typing import Any, NamedTuple

import pytest

from common.config.loading import load_config
from common.config.ppo import Config
from common.user_code.import_path import find_users_modules
from deploy.cli import main
from deploy.run.directory import sole_owner
from tests.test_docs import ROOT, TEXTS, blocks

# The test that does the work of a command.
WORK = {
    "train": "tests/end_to_end/test_run.py::test_the_reward_rises",
    "train --resume": "tests/end_to_end/test_run.py::test_a_run_that_is_cut_and_resumed_has_the_bits_of_a_whole_one",
    "train --address": "tests/end_to_end/test_elastic.py::test_the_run_continued_through_all_of_it",
    "train --restarts": "tests/chaos/test_chaos.py::test_a_killed_driver_is_started_again_with_resume",
    "submit": "tests/end_to_end/test_submit.py::test_the_job_runs_on_every_node_with_the_uploaded_code",
    "plan --suggest": "tests/deploy/plan/test_suggest.py::test_the_command_writes_a_config_whose_plan_fits",
    "plan": "tests/deploy/plan/test_command.py::test_the_plan_of_a_shipped_config_lists_every_process",
    "sample-pairs": "tests/end_to_end/test_rewards.py::test_the_labeller_preferred_more_a_words",
    "train-reward": "tests/end_to_end/test_rewards.py::test_two_ranks_learn_the_preference_and_report_its_interval",
    "train-critic": "tests/end_to_end/test_run.py::test_a_critic_is_trained_from_the_journal_of_a_run",
    "evaluate --samples": "tests/end_to_end/test_rewards.py::test_evaluate_compares_the_trained_policy_with_its_base",
    "evaluate --resume": "tests/end_to_end/test_rewards.py::test_an_evaluation_that_was_cut_ends_with_the_same_figures",
    "evaluate": "tests/end_to_end/test_rewards.py::test_evaluate_compares_the_trained_policy_with_its_base",
    "tune": "tests/end_to_end/test_tune.py::test_the_trials_of_a_tuning_are_whole_runs_with_a_sound_journal",
    "evaluate --variance": "tests/deploy/variance/test_command.py::"
    "test_the_newest_checkpoint_before_a_batch_is_measured_on_that_batch",
    "export": "tests/deploy/test_export.py::test_an_interrupted_run_gives_the_policy_of_its_newest_checkpoint",
    "audit": "tests/deploy/test_audit.py::test_an_audit_with_replay_proves_a_copy_without_ray_and_vllm",
    "replay": "tests/deploy/test_audit.py::test_every_step_of_a_run_can_be_rebuilt",
    "replay --credit": "tests/deploy/test_audit.py::test_an_audit_with_replay_proves_a_copy_without_ray_and_vllm",
    "report": "tests/deploy/report/test_page.py::test_the_command_prints_the_path_on_its_last_line",
    "scale": "tests/deploy/test_scale.py::test_a_target_reaches_the_pool",
    "cluster files": "tests/deploy/cluster/test_launcher.py::test_the_files_of_all_platforms_are_copied_once",
    "cluster kuberay": "tests/deploy/cluster/test_kuberay.py::test_kuberays_schemas_accept_cluster_and_job",
    "monitoring": "tests/deploy/monitoring/test_installation.py::test_the_files_name_each_other",
    "config": "tests/common/config/test_description.py::test_only_the_listed_settings_may_change_on_resume",
}
# Other programs, by the start of their lines: the test that runs them, or what they need.
OTHER = {
    "make demo-rlhf": "minutes",
    "make demo-critic": "minutes",
    "make demo": "minutes",
    "make test": "it runs the tests",
    "make exhaustive": "half an hour",
    "make check": "CI",
    ".ci/run": "CI",
    "diff <(python -m tests.digest ": "tests/test_digest.py",
    "python -m tests.bench.rates": "tests/deploy/plan/test_rates.py",
    "export RAY_AUTH_MODE=token": "a cluster",
    "pip wheel ": "tests/test_wheel.py",
    "pip install ": "a package index",
    "pip uninstall ": "a package index",
    "ray start --": "a cluster",
    "kubectl ": "Kubernetes",
    "docker ": "a container engine",
    "mkdir -p runs": "a container engine",
    "(umask 077; openssl rand ": "a cluster",
    "sbatch ": "tests/deploy/cluster/test_slurm.py",
    "ray get-auth-token": "a cloud",
    "chmod 600 ~/.ray/auth_token": "a cloud",
    "ray up ": "a cloud",
    "ray dashboard ": "a cloud",
    "prometheus ": "tests/end_to_end/test_monitoring.py",
    "grafana server ": "Grafana",
}
HEAVY = (  # the work that is replaced
    "deploy.train.run_training",
    "deploy.plan.command.run_plan",
    "deploy.plan.command.run_suggest",
    "deploy.train_reward.run_reward_training",
    "deploy.train_critic.run_critic_training",
    "deploy.sample_pairs.run_pair_sampling",
    "deploy.evaluation.command.run_evaluation",
    "deploy.tune.command.run_tune",
    "deploy.variance.command.run_variance",
    "deploy.export.run_export",
    "deploy.replay.run_replay",
    "deploy.replay.rebuild_credit",
    "deploy.audit.run_audit",
    "deploy.report.report.run_report",
    "deploy.submit.submit_run",
    "deploy.demo.run_rlhf_demo",
    "deploy.scale.scale",
    "deploy.restarts.Supervisor.run",
)


class Line(NamedTuple):
    page: str
    text: str


def command_lines() -> list[Line]:
    """The lines of every block of commands, without comments. A block of commands begins with a program's name; a
    screen that is shown begins with `ratchet` and the name of a model."""
    programs = ("ratchet ", *OTHER)
    found = []
    for page in TEXTS:
        for block in re.findall(r"^```\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S):
            if block.startswith(programs) and not block.startswith("ratchet embedded:"):
                lines = block.replace("\\\n", " ").splitlines()
                found += [Line(page.name, re.sub(r"\s+# .*", "", line)) for line in lines]
    return found


LINES = command_lines()


@pytest.fixture
def project_copy(tmp_path, monkeypatch):
    """A directory with what the pages name: configs, a task, and runs that can be continued."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    shipped = (ROOT / "deploy/configs/larger.toml").read_text()
    (tmp_path / "config.toml").write_text(shipped)
    quickstart = ROOT / "docs/quickstart.md"
    (tmp_path / "quickstart.toml").write_text(blocks(quickstart, "toml")[0])
    (tmp_path / "my_task.py").write_text(blocks(quickstart, "python")[0])
    find_users_modules(tmp_path)
    for name, config in (("mine", "config"), ("config", "config"), ("quickstart", "quickstart")):
        with sole_owner(tmp_path / "runs" / name) as held:
            held.begin(load_config(tmp_path / f"{config}.toml", [], Config), "train", force=False)
        (tmp_path / "runs" / name / "journal").mkdir()
    with sole_owner(tmp_path / "runs/mine-evaluation") as held:
        held.begin(load_config(tmp_path / "config.toml", [], Config), "evaluate", force=False)
    yield tmp_path
    sys.modules.pop("my_task", None)


@pytest.fixture
def done(monkeypatch):
    """What commands have asked for. Their work is replaced."""
    calls: list[Any] = []

    def note(*arguments: Any, **options: Any) -> int:
        calls.append((arguments, options))
        return 0

    for name in HEAVY:
        monkeypatch.setattr(name, note)
    monkeypatch.setattr("deploy.scale.show", lambda shown: None)
    return calls


@pytest.mark.parametrize(
    "line", [line for line in LINES if line.text.startswith("ratchet ")], ids=lambda line: line.text
)
def test_the_command_line_accepts_every_documented_command(line, project_copy, done, monkeypatch, capsys):
    arguments = shlex.split(line.text)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    assert done or out


def kind(text: str) -> str:
    """The entry of WORK for a line of `ratchet`."""
    command, *rest = shlex.split(text)[1:]
    options = (f"{command} {word}" for word in rest if f"{command} {word}" in WORK)
    return next(options, command)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.text)
def test_a_test_does_the_work_of_every_documented_command_or_it_says_what_it_needs(line):
    if line.text.startswith("ratchet "):
        path, _, test = WORK[kind(line.text)].partition("::")
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8")
    else:
        [where] = [where for start, where in OTHER.items() if line.text.startswith(start)][:1]
        assert not where.startswith("tests/") or (ROOT / where).exists()


def test_lines_are_found_on_every_page_that_has_commands():
    assert {"README.md", "CONTRIBUTING.md", "monitoring.md", "quickstart.md", "reliability.md"} <= {
        line.page for line in LINES
    }
    assert Line("README.md", "ratchet train --resume runs/mine") in LINES
    assert Line("CONTRIBUTING.md", ".ci/run") in LINES


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_commands_inside_sentences_exist(page):
    import typer.main

    from deploy import cli

    known = typer.main.get_command(cli.app).commands.keys()
    named = re.findall(r"`ratchet ([a-z][a-z-]*)[^`]*`", page.read_text(encoding="utf-8"))
    assert set(named) <= known
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([a-z-]+)[^`]*`", page.read_text(encoding="utf-8")))
    assert {target for target in targets if f"\n{target}:" not in makefile} == set()


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_settings_in_toml_blocks_are_toml(page):
    for block in blocks(page, "toml"):
        tomllib.loads(block)
