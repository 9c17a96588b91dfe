"""`ratchet plan`: its tables, its JSON object and its exit codes. Nothing starts, and no model has weights."""

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray.job_config import JobConfig
from transformers import LlamaConfig

import deploy.session
from common.errors import UserError
from common.memory import GIB, MIB
from deploy.cli import main
from deploy.cluster import own_cluster
from deploy.plan import machines
from deploy.plan.command import Models, run_plan, run_suggest
from deploy.plan.machines import SYSTEM, THIS_MACHINE, Described
from deploy.plan.placement import Node
from deploy.plan.planner import Planner
from deploy.plan.step import Typical
from deploy.plan.table import numbers
from deploy.run.directory import run_owner
from tests.fakes import tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory with nothing but a config: 135M weights, tied."""
    directory = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ).save_pretrained(directory)
    return directory


def plan(capsys, monkeypatch, *arguments):
    """Exit code and output of `ratchet plan`."""
    monkeypatch.setattr("sys.argv", ["ratchet", "plan", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().out


def write(path, **settings):
    path.write_text(tiny_config("m", ray={"object_store_mib": None}, **settings).to_toml())
    return path


CLUSTER = ("--nodes", 2, "--gpus", 4, "--gpu-memory", 80, "--cpus", 16, "--memory", 64)
ROLES = {
    "generators": {"dtype": "bfloat16", "gpus": 1, "min": 5, "max": 5},
    "reference": {"gpus": 0.5},
    "learner": {"gpus": 1, "precision": "bf16"},
}


def test_the_plan_of_a_shipped_config_lists_every_process(model, capsys, monkeypatch):
    shipped = ("deploy/configs/larger.toml", f"model.path={model}", "generators.gpus=0")
    code, shown = plan(capsys, monkeypatch, *shipped, "--cpus", 2, "--memory", 16)
    assert code == 0
    for name in ("node 1", "Learner(0)", "Generator(0)", "ReferencePolicy(0)", "Reward(0)", "It fits."):
        assert name in shown


def test_processes_of_one_role_on_one_node_share_a_row(model, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "run.toml", **ROLES)
    code, shown = plan(capsys, monkeypatch, path, f"model.path={model}", *CLUSTER)
    assert code == 0
    rows = [line.split("│")[1:5] for line in shown.splitlines() if "Generator" in line or "ReferencePolicy(" in line]
    # engines first: their machines' memory has vLLM and staged weights
    assert [(row[0].strip(), row[3].strip()) for row in rows[:3]] == [
        ("Generator 0-3", "0-3"),
        ("Generator(4)", "0"),
        ("ReferencePolicy(0)", "0.5 of 2"),
    ]


def test_json_has_the_place_and_the_parts_of_every_process(model, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "run.toml", **ROLES)
    code, shown = plan(capsys, monkeypatch, path, f"model.path={model}", *CLUSTER, "--json")
    found = json.loads(shown)
    assert (code, found["verdict"]) == (0, {"fits": True, "why_not": None, "waits_for_a_node": []})
    processes = {process["name"]: process for process in found["placement"]["processes"]}
    assert {name: (p["node"], p["gpus"]) for name, p in processes.items()} == {
        **{f"Generator({i})": (0, [i]) for i in range(4)},
        "Generator(4)": (1, [0]),
        "Learner(0)": (1, [1]),
        "ReferencePolicy(0)": (1, [2]),
        "Reward(0)": (0, []),
    }
    for process in processes.values():
        assert sum(process["host"].values()) == process["host_bytes"]
        assert sum(process["device"].values()) == process["device_bytes"]
    weights = 134_515_008
    assert processes["Learner(0)"]["device"]["optimizer state"] == 8 * weights
    tokens = found["placement"]["micro_batch_tokens"]
    assert tokens == 32_768  # filled in for a small model
    _, shown = plan(capsys, monkeypatch, path, f"model.path={model}", *CLUSTER)
    assert "activations (micro-batches of" in shown


def test_a_run_without_room_exits_with_1_and_says_what_to_change(model, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "run.toml", **ROLES)
    small = ("--nodes", 1, "--gpus", 4, "--gpu-memory", 80, "--cpus", 16, "--memory", 64)
    code, shown = plan(capsys, monkeypatch, path, f"model.path={model}", *small)
    assert code == 1
    assert "It does not fit: no node has room for Generator(" in shown
    assert "no room" in shown


@pytest.mark.parametrize(
    ("described", "what"),
    [
        (Described(nodes=2), "a described machine needs --cpus and --memory"),
        (Described(cpus=2), "--cpus and --memory"),
        (Described(cpus=2, memory=8, gpus=1), "--gpus .* and --gpu-memory .* go together"),
        (Described(cpus=2, memory=8, gpu_memory=80), "go together"),
        (Described(cpus=2, memory=float("nan")), r"--memory \(nan\) must be a finite number"),
        (Described(cpus=float("inf"), memory=9), r"--cpus \(inf\) must be a finite number"),
        (Described(cpus=2, memory=9, gpus=1, gpu_memory=float("nan")), r"--gpu-memory \(nan\) must be a finite"),
        (Described(cpus=2, memory=3), "the object store \\(1.0 GiB\\); give more"),
    ],
)
def test_half_a_description_of_a_machine_is_refused(described, what):
    with pytest.raises(UserError, match=what):
        described.make(1024)


def test_tokens_that_are_not_a_number_are_refused():
    with pytest.raises(UserError, match=r"--response-tokens \(nan\) must be at most sampling.max_new_tokens"):
        Typical(response_tokens=float("nan")).check(tiny_config("m"))


def test_described_nodes_keep_room_for_the_system_and_the_object_store():
    nodes = Described(nodes=2, gpus=8, gpu_memory=80, cpus=64, memory=512).make(4096)
    assert [(n.name, n.cpus, n.gpus, n.memory, n.gpu_memory, n.store) for n in nodes] == [
        (f"node {i}", 64, 8, 512 * GIB - SYSTEM - 4 * GIB, 80 * GIB, 4096 * MIB) for i in (1, 2)
    ]


def test_numbers_are_listed_as_ranges():
    assert numbers([0, 1, 2, 3, 6, 8, 9]) == "0-3, 6, 8-9"


def test_a_plan_that_fits_has_seconds_and_data_of_a_step(model, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "run.toml", **ROLES, max_staleness=1)
    given = (path, f"model.path={model}", *CLUSTER, "--json")
    code, shown = plan(capsys, monkeypatch, *given, "--rate", "h100", "--prompt-tokens", 6, "--response-tokens", 4)
    found = json.loads(shown)
    assert code == 0
    assert found["seconds"]["lengths"] == {"prompt": 6, "response": 4}
    phases = {phase["name"]: phase for phase in found["seconds"]["phases"]}
    assert phases["generate"]["at_least"]  # vLLM was not measured on this card
    [weights, *_] = found["traffic"]
    assert (weights["stores"], weights["between"]) == (269_030_016, 269_030_016)  # one other node has generators
    assert "score" in phases

    _, shown = plan(capsys, monkeypatch, *given)
    assert json.loads(shown)["seconds"]["step"]["seconds"] is None  # nobody says what GPUs these are
    _, shown = plan(capsys, monkeypatch, *given[:-1], "--rate", "h100")
    assert "Seconds of a step" in shown
    assert "Rates of h100: passes, updates and packing measured on one NVIDIA H100" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", "b300"), "h100, zen5-core"),
        (("--response-tokens", 5000), "--response-tokens (5000) must be at most sampling.max_new_tokens"),
        (("--rate", "b300", "--suggest"), "h100, zen5-core"),
        (("--cpus", 2, "--memory", "inf"), "--memory"),
        (("--cpus", 2, "--memory", 9, "--gpus", 1, "--gpu-memory", "inf"), "--gpu-memory"),
        (("--cpus", 2, "--memory", "nan"), "--memory"),
        (("--cpus", "nan", "--memory", 9, "--suggest"), "--cpus"),
        (("--response-tokens", "nan"), "--response-tokens"),
        (("--cpus", 2, "--memory", 9, "--nodes", 1001), "--nodes"),
        (("--cpus", 2, "--memory", 9, "--gpus", 65, "--gpu-memory", 80), "--gpus"),
        (("--cpus", 2, "--memory", 9, "--address", "h:1"), "give only one of them"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(options, message, model, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "run.toml")
    given = ("ratchet", "plan", path, f"model.path={model}", *options)
    monkeypatch.setattr("sys.argv", list(map(str, given)))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_a_described_machine_the_engines_build_is_checked(model, monkeypatch):
    monkeypatch.setattr("deploy.plan.capacity.version", {"vllm": "0.32.0"}.__getitem__)
    with pytest.raises(UserError, match=r"generators\.gpus"):
        run_plan(tiny_config(str(model)), Described())


def test_a_running_cluster_has_its_stores_whatever_the_config_says(model, capsys, monkeypatch):
    cfg = tiny_config(str(model), ray={"object_store_mib": 80, "address": "h:1"})  # too small for two sets of weights
    node = Node("n", 8, 0, 64 * GIB, store=2 * GIB)
    monkeypatch.setattr("deploy.plan.command.machines", lambda described, ray, store_mib: nullcontext([node]))
    assert run_plan(cfg, Described()) == 0
    assert "It fits." in capsys.readouterr().out


@pytest.fixture
def this_machine(monkeypatch):
    """A function that makes plans of this machine with these MiB free in /dev/shm and in the temporary directory."""

    def free(shared: int, disk: int) -> None:
        node = Node(THIS_MACHINE, 8, 0, 64 * GIB, labels={})
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr("deploy.plan.command.check_engine_build", lambda cfg: None)
        monkeypatch.setattr("deploy.plan.command.machines", lambda *args: nullcontext([node]))
        monkeypatch.setattr(own_cluster, "estimate_available_memory", lambda: 64 * GIB)
        monkeypatch.setattr(own_cluster, "get_shared_memory_bytes", lambda: shared * MIB)
        monkeypatch.setattr(own_cluster.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk * MIB))

    return free


NO_PLACE = "ray.object_store_mib (2000) must fit into /dev/shm, which has 64 MiB free, or into the temporary directory"


def test_a_store_that_this_machine_has_no_place_for_does_not_fit(model, this_machine, capsys, tmp_path):
    this_machine(shared=64, disk=1000)
    cfg = tiny_config(str(model), ray={"object_store_mib": 2000})
    assert run_plan(cfg, Described(), as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["verdict"]["fits"]
    assert found["verdict"]["why_not"].startswith(NO_PLACE)
    assert "seconds" not in found
    assert run_plan(cfg, Described()) == 1
    assert f"It does not fit: {NO_PLACE}" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=re.escape(NO_PLACE)):  # as in ratchet train
        own_cluster.start(cfg.ray, tmp_path, JobConfig())
    # The size of /dev/shm is not known for described machines.
    assert run_plan(cfg, Described(cpus=8, memory=64)) == 0
    assert "It fits." in capsys.readouterr().out


def test_a_store_that_will_be_a_file_fits_with_a_warning(model, this_machine, capsys):
    cfg = tiny_config(str(model), ray={"object_store_mib": 2000})
    this_machine(shared=64, disk=4000)
    assert run_plan(cfg, Described(), as_json=True) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["verdict"] == {"fits": True, "why_not": None, "waits_for_a_node": []}
    assert "warning: ray.object_store_mib (2000) does not fit into /dev/shm, which has 64 MiB free" in shown.err
    this_machine(shared=2000, disk=4000)
    assert run_plan(cfg, Described(), as_json=True) == 0
    assert capsys.readouterr().err == ""


def test_a_suggestion_needs_a_place_for_its_store_too(model, this_machine, capsys, tmp_path):
    tree = tiny_config(str(model), ray={"object_store_mib": None}).model_dump(exclude_unset=True)
    out = tmp_path / "suggested.toml"
    this_machine(shared=64, disk=500)
    assert run_suggest(tree, Described(), "a title", out=out) == 1
    assert "ray.object_store_mib (1024) must fit into /dev/shm" in capsys.readouterr().out
    assert not out.exists()
    this_machine(shared=64, disk=4000)
    assert run_suggest(tree, Described(), "a title", out=out) == 0
    assert "warning: ray.object_store_mib (1024) does not fit into /dev/shm" in capsys.readouterr().err
    assert out.exists()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo '40960, 8.0'; echo '81559, 9.0'", 81_559 * MIB),
        ("echo '16384, 7.0'", 0),  # no GPU that vLLM can use
        ("echo '[N/A], 9.0'", 0),
        ("exit 9", 0),
        (None, 0),  # no nvidia-smi
    ],
)
def test_the_memory_of_gpus_is_0_if_it_is_not_known(tmp_path, monkeypatch, script, expected):
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    node = machines.this_machine(1024)
    assert (node.gpus, node.gpu_memory) == (2, expected)


GROWING = {"address": "h:1", "autoscaler": True, "object_store_mib": None}


@pytest.mark.parametrize("autoscaler", [True, False])
@pytest.mark.parametrize("section", ["generators", "reference", "reward", "learner"])
def test_plan_and_train_decide_the_same(section, autoscaler, model, tmp_path, capsys, monkeypatch):
    """On the same cluster, for every role, with an autoscaler and without one."""
    monkeypatch.setattr("deploy.plan.command.check_engine_build", lambda cfg: None)
    monkeypatch.setattr(Planner, "remedy", lambda *args, **kwargs: "a remedy")
    others = {"learner": {"cpus": 1}, "generators": {"cpus": 1}}
    found = []
    for node in (Node("n", 4, 1, 64 * GIB, 80 * GIB), Node("n", 2, 0, 64 * GIB)):
        for resources in ({"cpus": 0}, {"cpus": 3}, {"gpus": 1, "cpus": 0}):
            cfg = tiny_config(str(model), ray={**GROWING, "autoscaler": autoscaler}, **{**others, section: resources})
            monkeypatch.setattr("deploy.plan.command.machines", lambda *args, node=node: nullcontext([node]))
            monkeypatch.setattr(deploy.session, "cluster", lambda *args, node=node: nullcontext([node]))
            code, models = run_plan(cfg, Described(), as_json=True), Models.of(cfg)
            shown = json.loads(capsys.readouterr().out)
            verdict, waiting = shown["verdict"], shown["verdict"]["waits_for_a_node"]
            assert waiting == [p["name"] for p in shown["placement"]["processes"] if p["waits_for_a_node"]]
            refused = nullcontext() if code == 0 else pytest.raises(UserError, match=re.escape(verdict["why_not"]))
            with (
                run_owner(tmp_path / "run") as owned,
                refused,
                deploy.session.session(cfg, "train", owned, models.phases, trains=models.policy),
            ):
                pass
            found.append("waits" if waiting else "starts" if code == 0 else "refused")
    lacks = "waits" if autoscaler and section != "learner" else "refused"
    three = "starts" if section in others else lacks  # cores next to learner and engine, which have one each
    assert found == ["starts", three, "starts", "starts", lacks, lacks]


def test_processes_that_wait_for_nodes_are_shown(model, capsys, monkeypatch):
    cfg = tiny_config(str(model), ray=GROWING, generators={"min": 2, "cpus": 9}, reference={"cpus": 9})
    monkeypatch.setattr(
        "deploy.plan.command.machines", lambda described, ray, store_mib: nullcontext([Node("n", 8, 0, 64 * GIB)])
    )
    monkeypatch.setenv("COLUMNS", "100")
    assert run_plan(cfg, Described()) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"waits for a node .*Generator 0-1.*ReferencePolicy\(0\)", shown)
    waits = "waits until the autoscaler has added nodes for Generator(0), Generator(1), ReferencePolicy(0), for at most"
    assert f"The run starts. It then {waits}" in shown
    assert "a step" in shown  # its seconds, and the data that travels to the new nodes
    assert run_plan(cfg, Described(cpus=8, memory=64)) == 1  # no cluster: all of it must fit these machines
    assert "It does not fit: no node has room for Generator(0)" in " ".join(capsys.readouterr().out.split())
