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
from deploy.plan.work import Lengths, published_bytes, update

INLINE = 100 * 1024  # bytes; Ray sends smaller results of calls with the answer, through the process that called
CREDIT_BYTES = 45  # of a response token in the credit table: eleven float32 numbers and a flag

Homes = Mapping[str, Sequence[int]]  # by section of the config: the node of each of its processes, by index


@dataclass(frozen=True)
class Flow:
    """What moves in a step, bytes."""

    what: str
    stores: float  # copied into the store of a node by the process that made it
    between: float  # from node to node, at most
    detail: str = ""


def traffic(cfg: Config, model: ModelSize, homes: Homes, *, lengths: Lengths | None = None) -> list[Flow]:
    """The flows of a step with rollouts of these lengths; by default, the longest ones."""
    lengths = lengths or Lengths.longest(cfg)
    ranks = homes["learner"]
    flows = [
        _weights(cfg, model, homes),
        _rollouts(cfg, homes, lengths),
        _reference(cfg, homes, lengths),
        _batch(cfg, homes, lengths),
    ]
    if cfg.credit.every:
        credit = CREDIT_BYTES * cfg.rollouts_per_step * lengths.response
        flows.append(Flow("values of each token", credit, 0, _every(cfg.credit.every)))
    if len(set(ranks)) > 1:
        flows.append(_exchange(cfg, model, ranks, lengths))
    if cfg.prompts.heldout and cfg.evaluation.prompts and cfg.evaluation.every:
        answers = BYTES_PER_TOKEN * cfg.evaluation.prompts * lengths.whole
        away = answers * _away(homes["generators"], [ranks[0]])
        flows.append(Flow("evaluation", answers, away, _every(cfg.evaluation.every)))
    return flows


def _every(steps: int) -> str:
    return "in each step" if steps == 1 else f"in one of {steps} steps"


def _weights(cfg: Config, model: ModelSize, homes: Homes) -> Flow:
    """Rank 0 puts one set into its store; every other node with generators fetches it once."""
    size, home = published_bytes(model), homes["learner"][0]
    others = len(set(homes["generators"]) - {home})
    detail = f"to {others} other node(s) with generators"
    if cfg.generators.updates == "changes":
        detail += "; far fewer bytes where few values change"
    return Flow("weights", size, others * size, detail)


def _rollouts(cfg: Config, homes: Homes, lengths: Lengths) -> Flow:
    """Each goes to a reward replica, to a reference replica and, with its batch, to the driver."""
    one = BYTES_PER_TOKEN * lengths.whole
    batch, driver = cfg.rollouts_per_step * one, homes["learner"][0]
    readers = [homes.get("reward", ()), homes.get("reference", ()), [driver]]
    between = batch * sum(_away(homes["generators"], nodes) for nodes in readers if nodes)
    small = "; small ones travel inside Ray's messages" if one < INLINE else ""
    return Flow("rollouts", batch, between, f"{cfg.rollouts_per_step} of {one / 1000:.3g} kB{small}")


def _reference(cfg: Config, homes: Homes, lengths: Lengths) -> Flow:
    measured = 4 * cfg.rollouts_per_step * lengths.response
    nodes = homes.get("reference", ())
    away = _away(nodes, [homes["learner"][0]]) if nodes else 0
    return Flow("reference log-probabilities", measured, measured * away)


def _batch(cfg: Config, homes: Homes, lengths: Lengths) -> Flow:
    """The driver puts the table into its store; every other node with ranks fetches it once."""
    table = BYTES_PER_TOKEN * cfg.rollouts_per_step * lengths.whole
    others = len(set(homes["learner"])) - 1
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
