"""Renders the Kubernetes objects of a run. KubeRay makes a cluster and a job from them.

Runs in a process of its own: `ratchet cluster kuberay`. It writes four files. claim.yaml is the shared storage, which
must outlive every run. files.yaml is a pod through which files are copied there. cluster.yaml is a RayCluster for
`ratchet submit`. job.yaml is a RayJob, which makes a cluster of its own for one run.

A cluster has three groups of pods. Each has the Ray label `group`, and the roles' `labels` choose their group:
  head        the driver and Ray's own servers; no role
  learner     a fixed number of pods: the learner's ranks, the reference, the reward services and the environment
  generators  one pod for each generator, up to generators.max, on spot machines; Ray's autoscaler adds a pod when the
              run has a generator that waits for room, and removes it when it is empty

A spot machine gives notice by ending its pods: `ray start` gets SIGTERM, drains its node, and waits until the generator
has handed over its unfinished responses (docs/elasticity.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePosixPath
from shlex import quote
from typing import Any

from common.config.base import Pooled
from common.config.ppo import Config
from common.errors import UserError
from deploy.ending.exit_message import USERS_FAULT

SHARED = "/shared"  # where every pod has the shared storage
FILES = "/etc/ratchet"  # where the head has the config and the job's command
USER = 1000  # of the images in deploy/cluster/docker/
SHUTDOWN_S = 5  # part of the notice that `ray start` needs after its node has drained
DRAIN_S = 5  # of pods that get no notice; Kubernetes ends them after 30 s
# Exit codes after which a new cluster would fail in the same way: a wrong input, and an image whose `ratchet` cannot be
# run or does not exist.
NOT_AGAIN = (USERS_FAULT, 126, 127)
STARTUP_TIMEOUT_S = 1800  # a new machine with GPUs, and a first download of the image, take many minutes
# Annotations of pods that must not be moved. Without them, an autoscaler of machines may end the head of a run to save
# a machine.
KEEP = {"karpenter.sh/do-not-disrupt": "true", "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
NO_PRIVILEGES = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",  # otherwise each start would look at every file of the storage
    "seccompProfile": {"type": "RuntimeDefault"},
}
# The group of each section's processes.
GROUPS = {
    "generators": "generators",
    "learner": "learner",
    "reference": "learner",
    "reward": "learner",
    "environment": "learner",
}
Object = dict[str, Any]  # of Kubernetes


@dataclass(frozen=True)
class Machine:
    """One pod of a group."""

    cpus: int
    memory_gib: int
    gpus: int = 0


@dataclass(frozen=True)
class Values:
    """Everything that is not in the config of the run."""

    name: str
    image: str
    directory: PurePosixPath  # with the user's own files, on the shared storage
    head: Machine
    learner: Machine
    learner_pods: int
    learner_node: Mapping[str, str]  # labels of machines for the learner's pods; empty: any machine
    generator: Machine
    spot: Mapping[str, str]  # labels of spot machines; empty: any machine
    notice_s: int  # between the notice of a spot machine and its end
    retries: int
    storage: str
    storage_class: str | None
    secret: str | None  # whose entries are environment variables of all pods
    pull_secret: str | None  # with which machines fetch the image

    @property
    def cluster(self) -> str:
        """The name of the RayCluster. KubeRay names services after it, and after the job."""
        return f"{self.name}-cluster"

    @property
    def files(self) -> str:
        """The name of the pod through which files are copied."""
        return f"{self.name}-files"

    @property
    def run(self) -> PurePosixPath:
        """The directory of the run."""
        return self.directory / "runs" / self.name


def learner_gpus(cfg: Config) -> int:
    """GPUs for the learner's ranks and the fewest reference, reward and environment processes: the largest shares
    first, each on the first GPU that has room."""
    services: list[Pooled] = [cfg.reward]
    if not cfg.learner.lora:
        services.append(cfg.reference)
    if cfg.environment is not None:
        services.append(cfg.environment)
    shares = [cfg.learner.gpus] * cfg.learner.ranks
    shares += [service.gpus for service in services for _ in range(service.min)]
    free: list[float] = []
    for share in sorted(shares, reverse=True):
        if share > 1:
            free += [0.0] * math.ceil(share)
            continue
        room = next((index for index, left in enumerate(free) if left >= share - 1e-4), None)
        if share and room is None:
            free.append(1 - share)
        elif room is not None:
            free[room] -= share
    return len(free)


def check(cfg: Config, values: Values) -> None:
    """Raises UserError if the pods are too small or too few for the processes that they are for."""
    needed = learner_gpus(cfg)
    if needed > values.learner.gpus * values.learner_pods:
        raise UserError(
            f"all roles but the generators need {needed} GPUs, and --learner-pods ({values.learner_pods}) with "
            f"--learner-gpus ({values.learner.gpus}) have fewer; raise one of them"
        )
    if cfg.generators.cpus > values.generator.cpus:
        raise UserError(
            f"generators.cpus ({cfg.generators.cpus:g}) must be at most the CPUs of --generator "
            f"({values.generator.cpus}); lower the first or raise the second"
        )
    if values.notice_s <= SHUTDOWN_S:
        raise UserError(f"--notice ({values.notice_s}) must be more than {SHUTDOWN_S} s, which Ray needs to end")


def settings_of_run(cfg: Config, values: Values) -> list[str]:
    """The settings that tell a run about the cluster: each role's group, and that generators may wait for pods. A
    generator reserves its whole pod. Otherwise several small generators would share a pod."""
    pod, given = values.generator, "startup_timeout_s" in cfg.ray.model_fields_set
    return [
        "ray.autoscaler=true",
        *([] if given else [f"ray.startup_timeout_s={STARTUP_TIMEOUT_S}"]),
        f"generators.cpus={pod.cpus}",
        *([f"generators.gpus={pod.gpus}"] if pod.gpus else []),
        *(f"{section}.labels.group={group}" for section, group in GROUPS.items() if getattr(cfg, section)),
    ]


def config_of_job(cfg: Config) -> str:
    """The run's config as TOML. Without an address: the job joins the cluster that KubeRay makes for it."""
    return cfg.model_copy(update={"ray": cfg.ray.model_copy(update={"address": None})}).to_toml()


def start_script(values: Values) -> str:
    """The job's command. KubeRay passes a job's command through a shell, so it is a file.

    If the input is wrong, the job stops itself. Its status is then STOPPED, not FAILED, and KubeRay treats it as
    complete. KubeRay does not see the exit codes of jobs, and a RayJob has no rule for them: podFailurePolicy is a
    field of Kubernetes' own Jobs."""
    run, home = quote(str(values.run)), quote(str(values.directory))
    return (
        "# The first start begins the run; every later start continues it.\n"
        f"if mkdir -p {home} && cd {home}; then\n"
        f"    if [ -e {run}/config.toml ]; then\n"
        f"        ratchet train --resume {run} --restarts 3\n"
        "    else\n"
        f"        ratchet train {FILES}/config.toml --run {run} --restarts 3\n"
        "    fi\n"
        "    code=$?\n"
        "else\n"
        "    code=1\n"
        "fi\n"
        "# KubeRay makes a new cluster after a job that failed, but not after one that was stopped. A fault of the\n"
        "# input would be there again, so this job stops itself.\n"
        f"case $code in {'|'.join(map(str, NOT_AGAIN))})\n"
        '    id=$(printenv RAY_JOB_CONFIG_JSON_ENV_VAR | sed -n \'s/.*"job_submission_id": *"\\([^"]*\\)".*/\\1/p\')\n'
        '    echo "The input is at fault (see above): this job stops, and is not tried again." >&2\n'
        '    ray job stop --no-wait "$id" && sleep 60\n'
        "esac\n"
        "exit $code\n"
    )


def claim(values: Values) -> Object:
    """Storage that all pods write to: models, the user's files, runs."""
    spec: Object = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": values.storage}}}
    if values.storage_class is not None:
        spec["storageClassName"] = values.storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": _claim(values)}, "spec": spec}


def files(values: Values) -> Object:
    """A pod that does nothing and sees the storage, for `kubectl cp`."""
    container = {
        "name": "files",
        "image": values.image,
        "command": ["sh", "-c", f"mkdir -p {quote(str(values.directory))} && exec sleep infinity"],
        "resources": _resources({"cpu": "1", "memory": "1Gi"}),
        "volumeMounts": [{"name": "shared", "mountPath": SHARED}],
        "securityContext": NO_PRIVILEGES,
    }
    spec = {**_pod([container], values), "volumes": [_storage(values)], "terminationGracePeriodSeconds": 1}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": values.files}, "spec": spec}


def cluster(cfg: Config, values: Values) -> Object:
    """A RayCluster, for `ratchet submit`."""
    return {**_ray("RayCluster", values.cluster), "spec": _cluster_spec(cfg, values, files=False)}


def job(cfg: Config, values: Values) -> list[Object]:
    """A RayJob, and the files of its head. After a failure KubeRay makes a new cluster, which continues the run. It
    makes none if the input was wrong."""
    files = {"config.toml": config_of_job(cfg), "start.sh": start_script(values)}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": values.name}, "data": files},
        {
            **_ray("RayJob", values.name),
            "spec": {
                "entrypoint": f"bash {FILES}/start.sh",
                "backoffLimit": values.retries,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": 600,  # seconds in which logs and dashboard stay readable
                "submitterPodTemplate": {"spec": _submitter(values)},
                "rayClusterSpec": _cluster_spec(cfg, values, files=True),
            },
        },
    ]


def _claim(values: Values) -> str:
    return f"{values.name}-shared"


def _storage(values: Values) -> Object:
    return {"name": "shared", "persistentVolumeClaim": {"claimName": _claim(values)}}


def _ray(kind: str, name: str) -> Object:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name}}


def _pod(containers: list[Object], values: Values) -> Object:
    """The parts that the specs of all pods share."""
    secrets = {"imagePullSecrets": [{"name": values.pull_secret}]} if values.pull_secret else {}
    return {"containers": containers, "securityContext": dict(POD_SECURITY), **secrets}


def _submitter(values: Values) -> Object:
    """The pod that sends the job to the cluster. KubeRay's own has no security settings."""
    container = {
        "name": "ray-job-submitter",
        "image": values.image,
        "resources": _resources({"cpu": "1", "memory": "1Gi"}),
        "securityContext": NO_PRIVILEGES,
    }
    return {**_pod([container], values), "restartPolicy": "Never"}


def _resources(amounts: Mapping[str, str]) -> Object:
    """Limits are what Ray counts. With equal requests Kubernetes ends other pods first when memory is short."""
    return {"limits": dict(amounts), "requests": dict(amounts)}


def _cluster_spec(cfg: Config, values: Values, *, files: bool) -> Object:
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},  # KubeRay makes the secret with the token
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 120,
            "securityContext": NO_PRIVILEGES,
        },
        # Ray places nothing that takes CPUs on the head.
        "headGroupSpec": _group("head", values.head, values, ray={"num-cpus": "0"}, files=files),
        "workerGroupSpecs": [
            _workers("learner", values.learner, values, fewest=values.learner_pods, most=values.learner_pods),
            # The autoscaler adds pods for a run's generators. With a minimum here, KubeRay would keep these pods
            # without a run, and start no job before they are ready.
            _workers("generators", values.generator, values, fewest=0, most=cfg.generators.max_replicas),
        ],
    }


def _workers(group: str, machine: Machine, values: Values, *, fewest: int, most: int) -> Object:
    """A group of pods besides the head."""
    return {
        "groupName": group,
        "replicas": fewest,
        "minReplicas": fewest,
        "maxReplicas": most,
        **_group(group, machine, values, spot=group == "generators"),
    }


def _group(
    group: str,
    machine: Machine,
    values: Values,
    *,
    ray: Mapping[str, str] | None = None,
    spot: bool = False,
    files: bool = False,
) -> Object:
    pod = _pod([_container(group, machine, values, spot=spot, files=files)], values)
    pod["volumes"] = [_storage(values)]
    if files:
        pod["volumes"].append({"name": "files", "configMap": {"name": values.name}})
    if spot:
        pod["terminationGracePeriodSeconds"] = values.notice_s
    chosen = {"generators": values.spot, "learner": values.learner_node}.get(group, {})
    if chosen:
        pod["nodeSelector"] = dict(chosen)
    tainted = [*(["nvidia.com/gpu"] if machine.gpus else []), *chosen]
    if tainted:
        pod["tolerations"] = [{"key": key, "operator": "Exists"} for key in tainted]
    metadata = {} if spot else {"metadata": {"annotations": dict(KEEP)}}
    return {"rayStartParams": dict(ray or {}), "labels": {"group": group}, "template": {**metadata, "spec": pod}}


def _container(group: str, machine: Machine, values: Values, *, spot: bool, files: bool) -> Object:
    resources: dict[str, str] = {"cpu": str(machine.cpus), "memory": f"{machine.memory_gib}Gi"}
    if machine.gpus:
        resources["nvidia.com/gpu"] = str(machine.gpus)
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HOME": f"{SHARED}/cache/huggingface",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(values.notice_s - SHUTDOWN_S if spot else DRAIN_S),
    }
    mounts = [{"name": "shared", "mountPath": SHARED}]
    if files:
        mounts.append({"name": "files", "mountPath": FILES})
    container: Object = {
        "name": "ray-head" if group == "head" else "ray-worker",
        "image": values.image,
        "resources": _resources(resources),
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "volumeMounts": mounts,
        "securityContext": NO_PRIVILEGES,
    }
    if values.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": values.secret}}]
    return container
