"""What can be refused before a job is sent, or a cluster joined: with no Ray running."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import tomllib
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import deploy.cluster.job
import deploy.submit
import deploy.train
from common.config.base import RayConfig
from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from deploy.cli import main
from deploy.cluster.addresses import named_address
from deploy.cluster.connection import cluster
from deploy.run.directory import sole_owner
from tests.fakes import save_tiny_model, tiny_config


@pytest.fixture(autouse=True)
def place(tmp_path, tmp_path_factory, monkeypatch):
    """A user's directory with a config, its prompts and its reward function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "a1"}) + "\n")
    model = save_tiny_model(tmp_path_factory.mktemp("model"))
    cfg = tiny_config(model, prompts={"train": "prompts.jsonl", "heldout": None}, evaluation={"prompts": 0})
    Path("tiny.toml").write_text(cfg.to_toml())
    return tmp_path


@pytest.fixture
def nowhere():
    """A port of this machine that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def refusal(capsys, monkeypatch, *arguments):
    """Runs the command line and returns the message that it ends with."""
    monkeypatch.setattr(sys, "argv", ["ratchet", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("ratchet: ") == 1
    return message


@pytest.mark.parametrize(
    ("configured", "variable", "address"),
    [
        (None, None, None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("10.0.0.2:6379", "10.0.0.1:6379", "10.0.0.2:6379"),
        ("local", "10.0.0.1:6379", None),
    ],
)
def test_the_config_overrides_the_variable_and_local_overrides_both(monkeypatch, configured, variable, address):
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert named_address(RayConfig(address=configured)) == address


def test_the_option_overrides_the_config(monkeypatch, place):
    seen = []
    monkeypatch.setattr(deploy.train, "run_training", lambda cfg, *_, **__: seen.append(cfg.ray.address))
    monkeypatch.setattr(
        sys, "argv", ["ratchet", "train", "tiny.toml", "ray.address=10.0.0.2:6379", "--address", "10.0.0.3:6379"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, seen) == (0, ["10.0.0.3:6379"])


def test_a_run_where_no_cluster_answers_is_refused_and_leaves_nothing(capsys, monkeypatch, place, nowhere):
    message = refusal(capsys, monkeypatch, "train", "tiny.toml", "--address", nowhere, "--run", "run")
    assert message.startswith(f"ratchet: no Ray cluster answers at {nowhere} (")
    assert "--address local" in message
    assert not Path("run").exists()


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "127.0.0.1", "http://127.0.0.1:8265"])
def test_an_address_must_be_a_host_and_a_port(address):
    with pytest.raises(UserError, match=r"must read HOST:PORT, such as"), cluster(RayConfig(address=address)):
        pass


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run", "run"], "name the cluster's dashboard with --address, such as http://127.0.0.1:8265"),
        (["--address", "127.0.0.1:8265", "--run", "run"], "--address (127.0.0.1:8265) must be the URL of"),
        (["--address", "http://[::1", "--run", "run"], "--address (http://[::1) must be the URL of"),
        (["--address", "http://a:99999", "--run", "run"], "--address (http://a:99999) must be the URL of"),
        (["--address", "http://127.0.0.1:8265"], "name the run directory with --run"),
        (["--address", "http://127.0.0.1:8265", "--run", "run", "ppo.clip=1"], "did you mean clip_eps or reward.clip?"),
        (["--address", "http://127.0.0.1:8265", "--run", "taken"], "has files that do not belong to a run"),
        (["--address", "http://127.0.0.1:8265", "--resume", "taken"], "--resume continues with the config of its run"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(capsys, monkeypatch, place, arguments, says):
    Path("taken").mkdir()
    Path("taken/thesis.tex").touch()
    assert says in refusal(capsys, monkeypatch, "submit", "tiny.toml", *arguments)
    assert not Path("run").exists()


def test_a_job_is_refused_where_no_dashboard_answers(capsys, monkeypatch, place, nowhere):
    message = refusal(capsys, monkeypatch, "submit", "tiny.toml", "--address", f"http://{nowhere}", "--run", "run")
    assert message.startswith(f"ratchet: no Ray dashboard answers at --address (http://{nowhere}): ")


@pytest.mark.parametrize("before", [None, "http://127.0.0.1:1"])
def test_connecting_restores_the_environment(monkeypatch, before):
    if before is None:
        monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", before)
    asked = []
    monkeypatch.setattr(
        deploy.submit, "JobSubmissionClient", lambda address: asked.append(os.environ["RAY_API_SERVER_ADDRESS"])
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        deploy.submit._connect(address)
    assert asked == [address]
    assert os.environ.get("RAY_API_SERVER_ADDRESS") == before


def test_a_proxy_never_sees_a_request_to_the_cluster(monkeypatch, place):
    asked = []

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.server.server_port, self.headers["Authorization"]))
            self.send_error(404)

        def log_message(self, *args):
            pass

    with ExitStack() as serving:
        dashboard, proxy = (serving.enter_context(HTTPServer(("127.0.0.1", 0), Dashboard)) for _ in range(2))
        for server in (dashboard, proxy):
            threading.Thread(target=server.serve_forever).start()
            serving.callback(server.shutdown)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.setenv("no_proxy", "example.org")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
        address = f"http://127.0.0.1:{dashboard.server_port}"
        with deploy.submit.no_proxy_for(address):
            assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,127.0.0.1"
            with pytest.raises(UserError, match="no Ray dashboard answers"):
                deploy.submit._connect(address)
    assert asked
    assert {port for port, _ in asked} == {dashboard.server_port}
    assert os.environ["no_proxy"] == "example.org"
    assert "NO_PROXY" not in os.environ


class Client:
    """Instead of Ray's: keeps what it is asked to run, and the files that travel."""

    def _upload_package_if_needed(self, directory, *, include_gitignore):
        self.carried = Path(directory)
        self.files = {path.name: path.read_text() for path in (self.carried / "ratchet_job").iterdir()}
        self.packages = {path.name for path in self.carried.iterdir()}
        return "gcs://_ray_pkg_0.zip"

    refusals = ("Request failed with status code 500: No available agent to submit job",)

    def submit_job(self, **job):
        if self.refusals:
            refusal, *self.refusals = self.refusals
            raise RuntimeError(refusal)
        self.job = job
        return "job_1"


@pytest.fixture
def sent(monkeypatch, capsys):
    """Submits with these arguments; what was sent."""
    client = Client()
    monkeypatch.setattr(deploy.submit, "_connect", lambda address: client)

    def submit(*arguments):
        options = ["--address", "http://127.0.0.1:1", "--no-follow"]
        monkeypatch.setattr(sys, "argv", ["ratchet", "submit", *map(str, arguments), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, capsys.readouterr().err
        return client

    return submit


def test_config_and_arguments_are_sent_as_files_not_as_metadata(sent, place):
    client = sent("tiny.toml", "seed=7", "--run", "a run", "--force")
    shown = json.dumps({key: value for key, value in client.job.items() if key != "runtime_env"})
    shown += json.dumps(client.job["runtime_env"]["env_vars"])
    config = tomllib.loads(client.files["config.toml"])
    assert config["seed"] == 7
    assert config["prompts"]["train"] == "prompts.jsonl"  # where the job's directory will be
    for secret in (config["model"]["path"], "seed", "sources"):
        assert secret not in shown
    assert client.job["runtime_env"]["py_modules"] == ["gcs://_ray_pkg_0.zip"]
    assert client.packages == {"ratchet_job", "actors", "common", "deploy", "learner"}  # and nothing else of ours
    assert not client.carried.exists()  # nothing is left here
    package = deploy.cluster.job.write_package(place, load_config(Path("tiny.toml"), [], Config), ["--run", "/a run"])
    assert deploy.cluster.job.command_line(package, "10.0.0.1:6379") == [
        *("train", f"{place}/ratchet_job/config.toml", "--run", "/a run", "--address", "10.0.0.1:6379")
    ]


def test_a_job_that_the_cluster_refuses_is_not_sent_again(monkeypatch, sent, place):
    monkeypatch.setattr(Client, "refusals", ("No available agent", "Request failed with status code 500: disk full"))
    with pytest.raises(AssertionError, match="did not take the job: Request failed with status code 500: disk full"):
        sent("tiny.toml", "--run", "run")


def test_a_cluster_without_an_agent_is_told_how_to_get_one(monkeypatch, sent, place):
    monkeypatch.setattr(Client, "refusals", 2 * ("Request failed with status code 500: No available agent",))
    monkeypatch.setattr(deploy.submit, "AGENT_S", -1)
    with pytest.raises(AssertionError, match=r"has no agent that takes jobs.*--dashboard-agent-listen-port=0"):
        sent("tiny.toml", "--run", "run")


def test_a_cluster_that_does_not_answer_ends_the_command(monkeypatch, sent, place):
    ended = []
    let_go = threading.Event()
    monkeypatch.setattr(deploy.submit, "SEND_S", 0.05)
    monkeypatch.setattr(deploy.submit, "_submit", lambda client, **job: let_go.wait(20) and "job_1")
    monkeypatch.setattr("deploy.ending.limits.end_run", lambda error: (ended.append(str(error)), let_go.set()))
    sent("tiny.toml", "--run", "run")
    assert ended == ["sending the job to the cluster at http://127.0.0.1:1 did not end within 0.05 s"]


def test_a_run_that_continues_as_a_job_takes_its_config_from_its_directory(sent, place):
    cfg = load_config(Path("tiny.toml"), [], Config, keep_relative=True)
    with sole_owner(place / "run") as held:
        held.begin(cfg, "train", force=False)
    client = sent("num_steps=9", "--resume", "run")
    run = str(place / "run")
    assert "config.toml" not in client.files
    assert json.loads(client.files["arguments.json"]) == ["num_steps=9", "--resume", run, "--restarts", "3"]
    client = sent("--resume", "run", "--restarts", "0", "--change", "kl.coef=0.5", "--accept", "model")
    options = ["--change=kl.coef=0.5", "--accept=model"]
    assert json.loads(client.files["arguments.json"]) == ["--resume", run, *options, "--restarts", "0"]


def test_modules_next_to_a_config_below_the_current_directory_are_sent(sent, place):
    home = place / "configs"
    home.mkdir()
    for name in ("tiny.toml", "prompts.jsonl"):
        Path(name).rename(home / name)
    (home / "rewards_next_to_it.py").write_text("def score(answer): return 1.0")
    source = 'reward.sources=[{name="a", function="rewards_next_to_it:score"}]'
    client = sent("configs/tiny.toml", source, "--run", "run")
    assert tomllib.loads(client.files["config.toml"])["prompts"]["train"] == "configs/prompts.jsonl"
    assert client.job["runtime_env"]["env_vars"] == {"RATCHET_IN_A_JOB": "1", "RATCHET_IMPORT_FROM": '["configs"]'}


def test_files_next_to_a_config_elsewhere_are_not_sent(capsys, monkeypatch, place, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "rewards_elsewhere.py").write_text("def score(answer): return 1.0")
    for name in ("tiny.toml", "prompts.jsonl"):
        Path(name).rename(elsewhere / name)
    to = ("submit", elsewhere / "tiny.toml", "--address", "http://127.0.0.1:1", "--run", "run")
    assert "prompts.train (prompts.jsonl) would not be sent with the job" in refusal(capsys, monkeypatch, *to)
    (place / "prompts.jsonl").touch()
    source = 'reward.sources=[{name="a", function="rewards_elsewhere:score"}]'
    assert "module rewards_elsewhere cannot be imported" in refusal(capsys, monkeypatch, *to, source)


def test_the_command_of_a_job_finds_the_interpreter_of_the_raylet(tmp_path):
    """A process that looks like a raylet starts one that looks like a supervisor, which runs the job's command."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho ran: "$@"\n')
    python.chmod(0o755)
    supervisor = "import subprocess, sys; subprocess.run(sys.argv[1], shell=True, env={'PATH': '/usr/bin:/bin'})"
    raylet = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:3]])"
    command = [sys.executable, "-c", raylet, supervisor, deploy.cluster.job.ENTRYPOINT]
    worker = f"--python_worker_command={python} /setup_worker.py --node-ip-address=127.0.0.1"
    done = subprocess.run([*command, "--session_dir=/x", worker], capture_output=True, text=True)
    assert done.stdout == "ran: -P -m deploy.cluster.job\n", done.stderr


def check(place, **sections):
    deploy.submit.check_travels(tiny_config("model", **sections), place)


def test_prompts_are_sent_only_from_the_current_directory(place):
    def prompts(source):
        return {"prompts": {"train": source, "heldout": None, "max_tokens": 8}}

    Path("runs").mkdir()
    Path("runs/prompts.jsonl").touch()
    Path("data").mkdir()
    Path("data/prompts.jsonl").touch()
    check(place, **prompts("data/prompts.jsonl"))
    check(place, **prompts("./prompts.jsonl"))
    check(place, **prompts("data/*.jsonl"))
    check(place, **prompts("/data/on-the-cluster.jsonl"))
    Path("data/more.parquet").touch()
    check(place, **prompts("data/*"))
    Path(".gitignore").write_text("data/more*\n")
    with pytest.raises(UserError, match=r"prompts.train \(data/\*\) would not be sent with the job: "):
        check(place, **prompts("data/*"))  # one of its two files does not
    with pytest.raises(
        UserError, match=r"prompts.train \(openai/gsm8k\) is neither a file, a directory nor a function"
    ):
        check(place, **prompts("openai/gsm8k"))
    for source in ("hf:openai/gsm8k?config=main", "reasoning-gym:chain_sum"):  # the cluster reads them itself
        check(place, **prompts(source))
    Path("gsm8k/data").mkdir(parents=True)
    Path("gsm8k/data/train.parquet").touch()
    check(place, **prompts("gsm8k?split=train"))
    Path(".gitignore").write_text("data/\n")
    with pytest.raises(UserError, match=r"prompts.train \(gsm8k\) would not be sent with the job: "):
        check(place, **prompts("gsm8k"))
    Path(".gitignore").write_text("data/\n")
    for source in (
        "data/prompts.jsonl",
        "data/*.jsonl",
        "data.parquet",
        "runs/prompts.jsonl",
        "../prompts.jsonl",
        "missing.jsonl",
    ):
        with pytest.raises(UserError, match=re.escape(f"prompts.train ({source}) would not be sent with the job: ")):
            check(place, **prompts(source))


def test_functions_that_do_not_import_are_refused(place):
    with pytest.raises(UserError, match=r"reward source a \(my_rewards:missing\): module my_rewards cannot"):
        check(place, reward={"sources": [{"name": "a", "function": "my_rewards:missing"}]})


def test_a_directory_too_large_to_send_is_refused_with_its_largest_file(monkeypatch, place):
    monkeypatch.setattr(deploy.submit, "LIMIT", 3 << 20)
    Path("small.bin").write_bytes(bytes(1 << 20))
    Path("runs").mkdir()
    Path("runs/huge.bin").write_bytes(bytes(4 << 20))
    check(place)  # runs/ stays here
    Path("large.bin").write_bytes(bytes(2 << 20))
    with pytest.raises(UserError, match=r"has 3 MiB, but the limit is 3 \(largest: large\.bin\)"):
        check(place)
    Path(".gitignore").write_text("*.bin\n")
    check(place)
