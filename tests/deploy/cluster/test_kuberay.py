"""The objects for KubeRay: its own schemas accept them, Ray's autoscaler reads them, and they say what the config
says."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from copy import deepcopy
from pathlib import Path, PurePosixPath

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config

from common.config.environment import EnvironmentConfig
from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from deploy.cli import app
from deploy.cluster import kuberay
from tests.fakes import tiny_config

ROOT = Path(__file__).parents[3]
# The definitions of KubeRay's release, ray.io_rayclusters.yaml and ray.io_rayjobs.yaml. They are not part of Ratchet.
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "data" / "kuberay"))
needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason=f"{CRDS} has no definitions of KubeRay; KUBERAY_CRDS names the directory that has them"
)
SETTINGS = (
    "generators.min=2", "generators.max=6", "generators.gpus=3", "generators.tensor_parallel=3", "learner.ranks=4",
    "learner.gpus=1", "reference.gpus=0.5", "reward.gpus=0.25", "reward.min=2", "generators.cpus=2",
)  # fmt: skip


def write(tmp_path, invoke, *options):
    """The objects of each file that the command writes."""
    to = tmp_path / "out"
    invoke(
        "cluster",
        "kuberay",
        "single-response-async",
        *SETTINGS,
        "--image",
        "registry/ratchet:gpu",
        "--to",
        to,
        *options,
    )
    return {path.stem: list(yaml.safe_load_all(path.read_text())) for path in to.iterdir()}


def run(*arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture
def invoke():
    return run


@pytest.fixture(scope="module")
def of_one_command(tmp_path_factory):
    options = ("--spot", "cloud.google.com/gke-spot=true", "--notice", 25, "--secret", "keys")
    return write(tmp_path_factory.mktemp("kuberay"), run, *options)


@pytest.fixture
def written(of_one_command):
    return deepcopy(of_one_command)


def strict(schema):
    """Closes every object of a schema, so that a field that KubeRay does not know is an error."""
    if isinstance(schema, list):
        for part in schema:
            strict(part)
    elif isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            schema.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
        for part in schema.values():
            strict(part)


def faults(document):
    text = (CRDS / f"ray.io_{document['kind'].lower()}s.yaml").read_text()
    definition = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # in C: it has a megabyte
    [schema] = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
    strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return [f"{fault.json_path}: {fault.message}" for fault in jsonschema.Draft7Validator(schema).iter_errors(document)]


@needs_crds
def test_kuberays_schemas_accept_cluster_and_job(written):
    [cluster], [_, job] = written["cluster"], written["job"]
    assert (cluster["kind"], job["kind"]) == ("RayCluster", "RayJob")
    assert faults(cluster) == faults(job) == []
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"  # such a fault is found
    assert len(faults(cluster)) == 1


def test_the_autoscaler_reads_groups_of_the_configs_sizes(written):
    cluster = written["cluster"][0]
    cluster["metadata"]["namespace"] = "default"
    groups = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert {name: (group["min_workers"], group["max_workers"], group["labels"]) for name, group in groups.items()} == {
        "headgroup": (0, 0, {"group": "head"}),
        "learner": (1, 1, {"group": "learner"}),
        "generators": (0, 6, {"group": "generators"}),  # up to generators.max, when the run asks for them
    }
    # Four ranks with a GPU each, and 0.5 + 0.25 + 0.25 of another one.
    assert groups["learner"]["resources"] == {"CPU": 16, "GPU": 5, "memory": 128 << 30}
    assert groups["generators"]["resources"] == {"CPU": 8, "GPU": 3, "memory": 32 << 30}
    assert groups["headgroup"]["resources"]["CPU"] == 0


def test_only_generators_are_on_spot_machines_and_have_time_to_drain(written):
    head, learner, generators = (
        group["template"]["spec"]
        for group in (
            written["cluster"][0]["spec"]["headGroupSpec"],
            *written["cluster"][0]["spec"]["workerGroupSpecs"],
        )
    )
    assert generators["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert {"key": "cloud.google.com/gke-spot", "operator": "Exists"} in generators["tolerations"]
    assert "nodeSelector" not in head
    assert "nodeSelector" not in learner
    [drain] = [e for e in generators["containers"][0]["env"] if e["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    assert int(drain["value"]) == 20 < generators["terminationGracePeriodSeconds"] == 25
    for pod in (head, learner):  # Kubernetes ends these after 30 s
        assert {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "5"} in pod["containers"][0]["env"]


def test_no_machine_may_be_emptied_of_head_or_learner_to_save_money(written):
    spec = written["cluster"][0]["spec"]
    for group in (spec["headGroupSpec"], spec["workerGroupSpecs"][0]):
        assert group["template"]["metadata"]["annotations"] == {
            "karpenter.sh/do-not-disrupt": "true", "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        }  # fmt: skip
    assert "metadata" not in spec["workerGroupSpecs"][1]["template"]


def test_only_the_learners_pods_are_on_machines_with_its_labels(tmp_path, invoke):
    spec = write(tmp_path, invoke, "--learner-node", "pool=a", "--spot", "pool=b")["cluster"][0]["spec"]
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    assert [pod.get("nodeSelector") for pod in pods] == [None, {"pool": "a"}, {"pool": "b"}]
    assert {"key": "pool", "operator": "Exists"} in pods[1]["tolerations"]


def test_every_pod_drops_its_privileges_and_has_the_pull_secret(tmp_path, invoke):
    written = write(tmp_path, invoke, "--pull-secret", "registry")
    spec = written["job"][1]["spec"]
    cluster = spec["rayClusterSpec"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    pods = [group["template"]["spec"] for group in groups] + [spec["submitterPodTemplate"]["spec"]]
    pods.append(written["files"][0]["spec"])
    nothing = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for pod in pods:
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert [container["securityContext"] for container in pod["containers"]] == [nothing]
    assert cluster["autoscalerOptions"]["securityContext"] == nothing  # of the head's second container


def test_objects_of_one_run_have_names_of_their_own(written):
    claim, files, cluster, job = (
        written[file][-1]["metadata"]["name"] for file in ("claim", "files", "cluster", "job")
    )
    assert len({claim, files, cluster, job}) == 4
    assert job == "single-response-async"


def test_the_files_pod_makes_the_directory_and_sees_the_storage(written):
    [pod] = written["files"]
    [container] = pod["spec"]["containers"]
    assert container["command"] == ["sh", "-c", "mkdir -p /shared/single-response-async && exec sleep infinity"]
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
    claim = written["claim"][0]["metadata"]["name"]
    assert pod["spec"]["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}]


def test_the_printed_submit_has_the_users_settings_and_those_of_the_cluster(tmp_path, invoke, capsys):
    write(tmp_path, invoke)
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[:3] == ["ratchet", "submit", "single-response-async"]
    assert tuple(line[3 : 3 + len(SETTINGS)]) == SETTINGS
    rest = line[3 + len(SETTINGS) :]
    options = ["--run", "/shared/single-response-async/runs/NEW", "--address", "http://127.0.0.1:8265"]
    assert rest[-4:] == options
    path = ROOT / "deploy" / "configs" / "single-response-async.toml"
    submitted = load_config(path, line[3:-4], Config, keep_relative=True)
    [job, _] = list(yaml.safe_load_all((tmp_path / "out" / "job.yaml").read_text()))
    assert submitted.to_toml() == job["data"]["config.toml"]


def test_a_users_own_limit_for_starts_stays_and_an_address_does_not(tmp_path, invoke):
    invoke(
        "cluster", "kuberay", "single-response-async", "ray.startup_timeout_s=700", "ray.address=10.0.0.1:6379",
        "generators.gpus=0.5", "--generator", 8, 64, "--image", "i", "--to", tmp_path,
    )  # fmt: skip
    [job, _] = list(yaml.safe_load_all((tmp_path / "job.yaml").read_text()))
    config = tomllib.loads(job["data"]["config.toml"])
    assert config["ray"]["startup_timeout_s"] == 700
    assert "address" not in config["ray"]
    assert (config["generators"]["cpus"], config["generators"]["gpus"]) == (8, 1)  # its whole pod


def test_a_run_that_does_not_fit_the_memory_of_its_pods_is_refused(tmp_path, invoke, capsys):
    with pytest.raises(UserError, match=r"does not fit its pods .*no node has room for Learner\(\d\)"):
        write(tmp_path, invoke, "--learner", 16, 1)
    assert not (tmp_path / "out").exists()
    write(tmp_path, invoke, "--learner", 16, 1, "model.path=/shared/no-such-model")
    assert "it was not checked whether the run fits" in capsys.readouterr().err


def test_every_pod_has_the_storage_the_secret_and_no_root(written):
    spec = written["job"][1]["spec"]["rayClusterSpec"]
    [claim] = written["claim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        [container] = pod["containers"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
        assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 1000)


def test_the_job_begins_a_run_once_and_then_continues_it(written, tmp_path):
    files, job = written["job"]
    assert job["spec"]["entrypoint"] == "bash /etc/ratchet/start.sh"
    assert (job["spec"]["backoffLimit"], job["spec"]["shutdownAfterJobFinishes"]) == (5, True)
    (tmp_path / "ratchet").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "ratchet").chmod(0o755)
    home = tmp_path / "shared" / "single-response-async"  # a new claim has no directories
    script = files["data"]["start.sh"].replace("/shared/", f"{tmp_path}/shared/")
    run, path = home / "runs" / "single-response-async", {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def start():
        return subprocess.run(["bash", "-c", script], env=path, capture_output=True, text=True, check=True).stdout

    assert start() == f"train /etc/ratchet/config.toml --run {run} --restarts 3\n"
    assert home.is_dir()
    run.mkdir(parents=True)
    (run / "config.toml").touch()
    assert start() == f"train --resume {run} --restarts 3\n"


@pytest.mark.parametrize(("code", "stopped"), [(0, False), (1, False), (2, True), (12, False), (137, False)])
def test_only_a_fault_of_the_user_stops_the_job(written, tmp_path, code, stopped):
    """KubeRay makes a new cluster after a job that FAILED, not after one that was STOPPED."""
    for name, text in {"ratchet": f"exit {code}", "ray": f'echo "$@" >> {tmp_path}/stopped; exit 1'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = written["job"][0]["data"]["start.sh"].replace("/shared/", f"{tmp_path}/shared/")
    job = {"runtime_env": {"env_vars": {"A": "b"}}, "metadata": {"job_name": "m", "job_submission_id": "mine-x7k2p"}}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}
    ended = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert ended.returncode == code  # Ray does not stop it here
    found = (tmp_path / "stopped").read_text() if (tmp_path / "stopped").exists() else ""
    assert found == ("job stop --no-wait mine-x7k2p\n" if stopped else "")
    assert ("this job stops, and is not tried again" in ended.stderr) == stopped


def test_an_image_without_ratchet_is_not_tried_again(written, tmp_path):
    """The shell finds no `ratchet`, and ends with 127."""
    (tmp_path / "ray").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/stopped; exit 1')
    (tmp_path / "ray").chmod(0o755)
    script = written["job"][0]["data"]["start.sh"].replace("/shared/", f"{tmp_path}/shared/")
    job = {"metadata": {"job_submission_id": "mine-x7k2p"}}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}
    ended = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert (ended.returncode, (tmp_path / "stopped").read_text()) == (127, "job stop --no-wait mine-x7k2p\n")
    assert "ratchet: command not found" in ended.stderr


@needs_crds
def test_a_ray_job_has_no_rule_for_exit_codes():
    """If this fails, KubeRay has got one, and the job need not stop itself."""
    text = (CRDS / "ray.io_rayjobs.yaml").read_text()
    assert "backoffLimit:" in text
    assert "podFailurePolicy" not in text
    assert "onExitCodes" not in text


def test_the_jobs_config_differs_only_in_what_the_cluster_needs(written, tmp_path):
    text = written["job"][0]["data"]["config.toml"]
    path = ROOT / "deploy" / "configs" / "single-response-async.toml"
    expected = load_config(path, SETTINGS, Config, keep_relative=True).model_dump(exclude_none=True, mode="json")
    found = tomllib.loads(text)
    labels = {section: found[section].pop("labels") for section in ("generators", "learner", "reference", "reward")}
    assert labels == {
        "generators": {"group": "generators"}, "learner": {"group": "learner"}, "reference": {"group": "learner"},
        "reward": {"group": "learner"},
    }  # fmt: skip
    assert (found["ray"].pop("autoscaler"), expected["ray"].pop("autoscaler")) == (True, False)
    assert (found["ray"].pop("startup_timeout_s"), expected["ray"].pop("startup_timeout_s")) == (1800, 300)
    assert (found["generators"].pop("cpus"), expected["generators"].pop("cpus")) == (8, 2)  # its whole pod
    for section in labels:
        assert expected[section].pop("labels") == {}
    assert found == expected


@pytest.mark.parametrize(
    ("shares", "gpus"),
    [
        ((1, 0.5, 0.25, 0.25, 0), 1),
        ((1, 0.6, 0.6, 0.6, 0), 3),  # 1.8 in all, but no two fit on one
        ((8, 1, 1, 0, 0), 9),
        ((2, 0, 0, 0, 0), 0),
        ((1, 1, 0.5, 0.5, 0.5), 3),
    ],
)
def test_shares_of_gpus_are_packed_as_ray_packs_them(shares, gpus):
    ranks, learner, reference, reward, environment = shares
    sections = {
        "learner": {"ranks": ranks, "gpus": learner},
        "reference": {"gpus": reference},
        "reward": {"gpus": reward},
    }
    cfg = tiny_config("model")
    changed = {name: getattr(cfg, name).model_copy(update=values) for name, values in sections.items()}
    if environment:
        changed["environment"] = EnvironmentConfig(function="my_game:Game", gpus=environment)
    assert kuberay.learner_gpus(cfg.model_copy(update=changed)) == gpus


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--learner-gpus", 4],
            "all roles but the generators need 5 GPUs, and --learner-pods (1) with --learner-gpus",
        ),
        (["--generator", 1, 8], "generators.cpus (2) must be at most the CPUs of --generator (1)"),
        (["--notice", 5], "--notice (5) must be more than 5 s"),
        (["--spot", "gke-spot"], "--spot (gke-spot) must be a label of machines"),
        (["--name", "A_run"], "--name (A_run) must have lower-case letters"),
        (["--directory", "/shared/../etc"], "--directory (/shared/../etc) must be on the shared storage"),
        (["--directory", "/home/me"], "--directory (/home/me) must be on the shared storage, below /shared"),
    ],
)
def test_values_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, invoke, options, message):
    with pytest.raises(UserError) as refused:
        write(tmp_path, invoke, *options)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_only_files_of_an_earlier_call_are_replaced(tmp_path, invoke):
    before, after = write(tmp_path, invoke), write(tmp_path, invoke, "--retries", 7)
    assert before["job"] != after["job"]
    for file in (tmp_path / "out").iterdir():
        if file.name != "job.yaml":
            file.unlink()
    (tmp_path / "out/job.yaml").write_text("mine: 1\n")
    with pytest.raises(UserError, match=r"job\.yaml does not begin like the files that ratchet cluster kuberay"):
        write(tmp_path, invoke)
    assert [(file.name, file.read_text()) for file in (tmp_path / "out").iterdir()] == [("job.yaml", "mine: 1\n")]


def test_the_size_of_a_pod_is_what_the_options_say(tmp_path, invoke):
    cluster = write(tmp_path, invoke, "--learner", 96, 900, "--learner-pods", 2, "--learner-gpus", 8)["cluster"][0]
    learner = cluster["spec"]["workerGroupSpecs"][0]
    limits = learner["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (learner["replicas"], limits) == (2, {"cpu": "96", "memory": "900Gi", "nvidia.com/gpu": "8"})


def test_an_environment_runs_in_the_pods_of_the_learner():
    machine = kuberay.Machine(4, 16)
    values = kuberay.Values(
        "run", "image", PurePosixPath("/shared/run"), machine, machine, 1, {}, machine, {}, 30, 5, "1Gi", None, None,
        None,
    )  # fmt: skip
    cfg = tiny_config("model")
    settings = "environment.labels.group=learner"
    assert settings not in kuberay.settings_of_run(cfg, values)
    played = cfg.model_copy(update={"environment": EnvironmentConfig(function="my_game:Game")})
    assert settings in kuberay.settings_of_run(played, values)
