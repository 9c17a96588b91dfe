"""A run on Kubernetes: the objects that KubeRay makes a cluster and a job of, from a config and a few values.

Runs in a process of its own: `ratchet cluster kuberay`. Three files come out. claim.yaml is the shared storage, which
must outlive every run. cluster.yaml is a RayCluster for `ratchet submit`. job.yaml is a RayJob, which makes a cluster
of its own for one run.

A cluster has three groups of pods. Each has the Ray label `group`, and the roles' `labels` choose their group:
  head        the driver and Ray's own servers; no role
  learner     a fixed number of pods: the learner's ranks, the reference and the reward services
  generators  one pod for each generator, between generators.min and generators.max, on spot machines; Ray's autoscaler
              adds a pod when the run has a generator that waits for room

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

import tomli_w

from common.config.ppo import Config
from common.errors import UserError

SHARED = "/shared"  # where every pod has the shared storage
FILES = "/etc/ratchet"  # where the head has the config and the job's command
USER = 1000  # of the images in deploy/cluster/docker/
SHUTDOWN_S = 5  # part of the notice that `ray start` needs after its node has drained
GROUPS = {"generators": "generators", "learner": "learner", "reference": "learner", "reward": "learner"}  # by section
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
    generator: Machine
    spot: Mapping[str, str]  # labels of spot machines; empty: any machine
    notice_s: int  # between the notice of a spot machine and its end
    retries: int
    storage: str
    storage_class: str | None
    secret: str | None  # whose entries are environment variables of all pods

    @property
    def run(self) -> PurePosixPath:
        """The directory of the run."""
        return self.directory / "runs" / self.name


def learner_gpus(cfg: Config) -> int:
    """GPUs for the learner's ranks and the fewest reference and reward processes: the largest shares first, each on the
    first GPU that has room."""
    reference = [] if cfg.learner.lora is not None else [cfg.reference.gpus] * cfg.reference.min
    shares = [cfg.learner.gpus] * cfg.learner.ranks + reference + [cfg.reward.gpus] * cfg.reward.min
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
            f"learner, reference and reward need {needed} GPUs, and --learner-pods ({values.learner_pods}) with "
            f"--learner-gpus ({values.learner.gpus}) have fewer; raise one of them"
        )
    if cfg.generators.cpus > values.generator.cpus:
        raise UserError(
            f"generators.cpus ({cfg.generators.cpus:g}) must fit into --generator-cpus ({values.generator.cpus}); "
            "lower the first or raise the second"
        )
    if values.notice_s <= SHUTDOWN_S:
        raise UserError(f"--notice ({values.notice_s}) must be more than {SHUTDOWN_S} s, which Ray needs to end")


def config_of_job(cfg: Config) -> str:
    """The config as TOML, with each role in its group. Generators may wait for pods."""
    tree = cfg.model_dump(exclude_none=True, mode="json")
    tree["ray"]["autoscaler"] = True
    for section, group in GROUPS.items():
        tree[section]["labels"] = {**tree[section]["labels"], "group": group}
    return tomli_w.dumps(tree)


def start_script(values: Values) -> str:
    """The job's command. KubeRay passes a job's command through a shell, so it is a file."""
    run = quote(str(values.run))
    return (
        "# The first start begins the run; every other one continues it.\n"
        f"cd {quote(str(values.directory))} || exit 2\n"
        f"if [ -e {run}/config.toml ]; then\n"
        f"    exec ratchet train --resume {run} --restarts 3\n"
        "fi\n"
        f"exec ratchet train {FILES}/config.toml --run {run} --restarts 3\n"
    )


def claim(values: Values) -> Object:
    """Storage that all pods write to: models, the user's files, runs."""
    spec: Object = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": values.storage}}}
    if values.storage_class is not None:
        spec["storageClassName"] = values.storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": _claim(values)}, "spec": spec}


def cluster(cfg: Config, values: Values) -> Object:
    """A RayCluster, for `ratchet submit`."""
    return {**_ray("RayCluster", values), "spec": _cluster_spec(cfg, values, files=False)}


def job(cfg: Config, values: Values) -> list[Object]:
    """A RayJob, and the files of its head. After a failure KubeRay makes a new cluster, which continues the run."""
    files = {"config.toml": config_of_job(cfg), "start.sh": start_script(values)}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": values.name}, "data": files},
        {
            **_ray("RayJob", values),
            "spec": {
                "entrypoint": f"bash {FILES}/start.sh",
                "backoffLimit": values.retries,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": 600,  # so long its logs and its dashboard can be read
                "rayClusterSpec": _cluster_spec(cfg, values, files=True),
            },
        },
    ]


def _claim(values: Values) -> str:
    return f"{values.name}-shared"


def _ray(kind: str, values: Values) -> Object:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": values.name}}


def _cluster_spec(cfg: Config, values: Values, *, files: bool) -> Object:
    fewest = cfg.generators.min
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},  # KubeRay makes the secret with the token
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "upscalingMode": "Default", "idleTimeoutSeconds": 120},
        # Ray places nothing that takes CPUs on the head.
        "headGroupSpec": _group("head", values.head, values, ray={"num-cpus": "0"}, files=files),
        "workerGroupSpecs": [
            _workers("learner", values.learner, values, fewest=values.learner_pods, most=values.learner_pods),
            _workers("generators", values.generator, values, fewest=fewest, most=cfg.generators.max_replicas),
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
    pod: Object = {
        "containers": [_container(group, machine, values, spot=spot, files=files)],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",  # otherwise each start would look at every file of the storage
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": _claim(values)}}],
    }
    if files:
        pod["volumes"].append({"name": "files", "configMap": {"name": values.name}})
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists"}] if machine.gpus else []
    if spot:
        pod["terminationGracePeriodSeconds"] = values.notice_s
        if values.spot:
            pod["nodeSelector"] = dict(values.spot)
            tolerations += [{"key": key, "operator": "Exists"} for key in values.spot]
    if tolerations:
        pod["tolerations"] = tolerations
    return {"rayStartParams": dict(ray or {}), "labels": {"group": group}, "template": {"spec": pod}}


def _container(group: str, machine: Machine, values: Values, *, spot: bool, files: bool) -> Object:
    resources: dict[str, str] = {"cpu": str(machine.cpus), "memory": f"{machine.memory_gib}Gi"}
    if machine.gpus:
        resources["nvidia.com/gpu"] = str(machine.gpus)
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HOME": f"{SHARED}/cache/huggingface"}
    if spot:
        environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = str(values.notice_s - SHUTDOWN_S)
    mounts = [{"name": "shared", "mountPath": SHARED}]
    if files:
        mounts.append({"name": "files", "mountPath": FILES})
    container: Object = {
        "name": "ray-head" if group == "head" else "ray-worker",
        "image": values.image,
        # Limits are what Ray counts. With equal requests Kubernetes ends other pods first when memory is short.
        "resources": {"limits": resources, "requests": resources.copy()},
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if values.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": values.secret}}]
    return container


def settings_for_submit() -> list[str]:
    """What a submitted run needs to know of the cluster, as settings."""
    return ["ray.autoscaler=true", *(f"{section}.labels.group={group}" for section, group in GROUPS.items())]
