"""Checks, before Kubernetes files are written, that a run fits its pods. Runs in the process of `ratchet cluster`.

It makes the plan that the driver will make on the cluster (deploy/plan/).
"""

from __future__ import annotations

from common.config.ppo import Config
from common.errors import UserError
from common.memory import GIB
from deploy.cluster.kuberay import Machine, Values
from deploy.plan.command import Models
from deploy.plan.placement import Node
from deploy.plan.planner import Planner
from deploy.screen.console import complain

STORE = 0.3  # part of a node's memory that Ray takes for its object store
MAX_STORE = 200_000_000_000  # bytes; Ray takes no more


def check_memory(cfg: Config, values: Values) -> None:
    """Raises UserError if the plan of the run does not fit the pods. Prints a message instead if the sizes of the
    models are not known here, because their directories may be on the cluster only."""
    try:
        models = Models.of(cfg)
    except UserError as error:
        complain(f"it was not checked whether the run fits the memory of its pods: {error}")
        return
    try:
        Planner(nodes(cfg, values), models.phases, trains=models.policy, engines=models.policy).check(cfg)
    except UserError as error:
        raise UserError(f"the run does not fit its pods (--learner, --learner-pods, --generator): {error}") from None


def nodes(cfg: Config, values: Values) -> list[Node]:
    """The cluster's nodes, once the fewest generators have their pods."""
    return [
        *(_node(f"learner pod {i + 1}", "learner", values.learner) for i in range(values.learner_pods)),
        *(_node(f"generator pod {i + 1}", "generators", values.generator) for i in range(cfg.generators.min)),
    ]


def _node(name: str, group: str, pod: Machine) -> Node:
    """A pod as Ray sees it. The memory of its GPUs is not known."""
    memory = pod.memory_gib * GIB
    store = int(min(STORE * memory, MAX_STORE))
    return Node(name, pod.cpus, pod.gpus, memory, store=store, labels={"group": group})
