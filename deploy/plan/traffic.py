"""The bytes that a training step moves: through the object stores of the nodes, and from node to node. Runs in the
driver; pure arithmetic.

A node fetches an object once, for all its processes. The driver is counted on the node of the learner's first rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from common.config.ppo import Config
from common.memory import BYTES_PER_TOKEN
from common.model.size import ModelSize
from deploy.plan.placement import Place, Placement
from deploy.plan.work import Lengths, published_bytes, update

INLINE = 100 * 1024  # bytes; Ray sends smaller results of calls with the answer, through the process that called
CREDIT_BYTES = 46  # of a response token in the credit table: eleven float32 numbers and two flags

Homes = Mapping[str, Sequence[int]]  # by section of the config: the node of each of its processes, the first one first


def homes(placement: Placement) -> Homes:
    """The nodes of all processes that have a place. A process that waits for a node gets one of its own."""
    waiting = [Place(need, len(placement.nodes) + index) for index, need in enumerate(placement.waiting)]
    found: dict[str, list[int]] = {}
    for place in sorted([*placement.places, *waiting], key=lambda p: (len(p.need.name), p.need.name)):  # (9), (10)
        found.setdefault(place.need.section, []).append(place.node)
    return found


@dataclass(frozen=True)
class Flow:
    """What moves in a step, bytes."""

    what: str
    stores: float  # copied into the store of a node by the process that made it
    between: float  # from node to node, at most
    detail: str = ""


def traffic(cfg: Config, model: ModelSize, nodes: Homes, *, lengths: Lengths | None = None) -> list[Flow]:
    """The flows of a step with rollouts of these lengths; by default, the longest ones."""
    lengths = lengths or Lengths.longest(cfg)
    ranks = nodes["learner"]
    flows = [
        _weights(cfg, model, nodes),
        _rollouts(cfg, nodes, lengths),
        _reference(cfg, nodes, lengths),
        _batch(cfg, nodes, lengths),
    ]
    if cfg.credit.every:
        credit = CREDIT_BYTES * cfg.rollouts_per_step * lengths.response
        flows.append(Flow("values of each token", credit, 0, _every(cfg.credit.every)))
    if len(set(ranks)) > 1:
        flows.append(_exchange(cfg, model, ranks, lengths))
    if cfg.prompts.heldout and cfg.evaluation.prompts and cfg.evaluation.every:
        answers = BYTES_PER_TOKEN * cfg.evaluation.prompts * lengths.whole
        away = answers * _away(nodes["generators"], [ranks[0]])
        flows.append(Flow("evaluation", answers, away, _every(cfg.evaluation.every)))
    return flows


def _every(steps: int) -> str:
    return "in each step" if steps == 1 else f"in one of {steps} steps"


def _weights(cfg: Config, model: ModelSize, nodes: Homes) -> Flow:
    """Rank 0 puts one set into its store; every other node with generators fetches it once."""
    size, home = published_bytes(model), nodes["learner"][0]
    others = len(set(nodes["generators"]) - {home})
    detail = f"to {others} other node(s) with generators"
    if cfg.generators.updates == "changes":
        detail += "; far fewer bytes where few values change"
    return Flow("weights", size, others * size, detail)


def _rollouts(cfg: Config, nodes: Homes, lengths: Lengths) -> Flow:
    """Each goes to a reward replica, to a reference replica and, with its batch, to the driver."""
    one = BYTES_PER_TOKEN * lengths.whole
    batch, driver = cfg.rollouts_per_step * one, nodes["learner"][0]
    readers = [nodes.get("reward", ()), nodes.get("reference", ()), [driver]]
    between = batch * sum(_away(nodes["generators"], places) for places in readers if places)
    small = "; small ones travel inside Ray's messages" if one < INLINE else ""
    return Flow("rollouts", batch, between, f"{cfg.rollouts_per_step} of {one / 1000:.3g} kB{small}")


def _reference(cfg: Config, nodes: Homes, lengths: Lengths) -> Flow:
    measured = 4 * cfg.rollouts_per_step * lengths.response
    replicas = nodes.get("reference", ())
    away = _away(replicas, [nodes["learner"][0]]) if replicas else 0
    return Flow("reference log-probabilities", measured, measured * away)


def _batch(cfg: Config, nodes: Homes, lengths: Lengths) -> Flow:
    """The driver puts the table into its store; every other node with ranks fetches it once."""
    table = BYTES_PER_TOKEN * cfg.rollouts_per_step * lengths.whole
    others = len(set(nodes["learner"])) - 1
    return Flow("batch", table, others * table, f"to {others} other node(s) with ranks")


def _exchange(cfg: Config, model: ModelSize, ranks: Sequence[int], lengths: Lengths) -> Flow:
    """Sharded ranks on several nodes: each pass gathers all weights, forward and backward, and each backward pass sends
    all gradients, in float32. In a ring each node passes on all but one rank's share of them."""
    ppo, learner = cfg.ppo, cfg.learner
    networks = 2 if ppo.has_critic and learner.critic == "separate" else 1
    gathered = (2 if learner.precision == "bf16" else 4) * model.parameters * networks
    gradients = 4 * model.parameters * networks if learner.lora is None else 0
    tokens = cfg.rollouts_per_step * lengths.whole / len(ranks)
    minibatch = ceil(tokens / ppo.minibatches / learner.token_budget)
    passes = ceil(tokens / learner.token_budget) if update(cfg, model, lengths).before else 0
    trained = ppo.ppo_epochs * ppo.minibatches * minibatch
    all_of_it = passes * gathered + trained * (2 * gathered + gradients)
    ring = len(set(ranks)) * (len(ranks) - 1) / len(ranks)
    detail = f"outside the stores; {trained} pass(es) with gradients, {passes} without"
    return Flow("weights and gradients among ranks", 0, ring * all_of_it, detail)


def _away(sources: Sequence[int], targets: Sequence[int]) -> float:
    """The share of pairs of a source and a target that are on different nodes."""
    pairs = [(source, target) for source in sources for target in targets]
    return sum(source != target for source, target in pairs) / len(pairs)
