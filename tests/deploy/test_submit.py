"""What can be refused before a job is sent, or a cluster joined: with no Ray running."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest

import deploy.submit
import deploy.train
from common.config import RayConfig, UserError
from deploy import signals
from deploy.cli import main
from deploy.cluster import cluster, named_address
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
    monkeypatch.setattr(signals, "catch", lambda: None)
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
def test_the_config_goes_over_the_variable_and_local_over_both(monkeypatch, configured, variable, address):
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert named_address(RayConfig(address=configured)) == address


def test_the_option_goes_over_the_config(monkeypatch, place):
    seen = []
    monkeypatch.setattr(deploy.train, "run_training", lambda cfg, *_, **__: seen.append(cfg.ray.address))
    monkeypatch.setattr(
        sys, "argv", ["ratchet", "train", "tiny.toml", "ray.address=10.0.0.2:6379", "--address", "10.0.0.3:6379"]
    )
    monkeypatch.setattr(signals, "catch", lambda: None)
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
        (["--address", "http://127.0.0.1:8265"], "name the run directory with --run"),
        (["--address", "http://127.0.0.1:8265", "--run", "run", "ppo.clip=1"], "did you mean clip_eps or reward.clip?"),
        (["--address", "http://127.0.0.1:8265", "--run", "taken"], "holds something that is no run"),
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
def test_connecting_leaves_the_environment_as_it_was(monkeypatch, before):
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


def check(place, **sections):
    deploy.submit.check_travels(tiny_config("model", **sections), place)


def test_prompts_travel_only_from_the_current_directory(place):
    def prompts(source):
        return {"prompts": {"train": source, "heldout": None, "max_tokens": 8}}

    Path("runs").mkdir()
    Path("runs/prompts.jsonl").touch()
    Path("data").mkdir()
    Path("data/prompts.jsonl").touch()
    check(place, **prompts("data/prompts.jsonl"))
    check(place, **prompts("./prompts.jsonl"))
    check(place, **prompts("/data/on-the-cluster.jsonl"))
    Path(".gitignore").write_text("data/\n")
    for source in ("data/prompts.jsonl", "runs/prompts.jsonl", "../prompts.jsonl", "missing.jsonl"):
        with pytest.raises(UserError, match=rf"prompts.train \({source}\) does not travel with the job: "):
            check(place, **prompts(source))


def test_functions_that_do_not_import_are_refused(place):
    with pytest.raises(UserError, match=r"reward source a \(my_rewards:missing\): module my_rewards cannot"):
        check(place, reward={"sources": [{"name": "a", "function": "my_rewards:missing"}]})


def test_a_directory_too_large_to_travel_is_refused_naming_the_largest_file(monkeypatch, place):
    monkeypatch.setattr(deploy.submit, "LIMIT", 3 << 20)
    Path("small.bin").write_bytes(bytes(1 << 20))
    Path("runs").mkdir()
    Path("runs/huge.bin").write_bytes(bytes(4 << 20))
    check(place)  # runs/ stays here
    Path("large.bin").write_bytes(bytes(2 << 20))
    with pytest.raises(UserError, match=r"holds 3 MiB, and a job may carry 3 \(largest: large\.bin\)"):
        check(place)
    Path(".gitignore").write_text("*.bin\n")
    check(place)
