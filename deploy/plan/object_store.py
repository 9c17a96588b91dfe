"""The contents of a run's object store, and the size of a store that is started for it. Pure arithmetic.

Runs in the driver. Published weights, rollouts and batches are in the object store of their node, which is shared
memory. Ray moves objects that find no room there to a disk, and the run becomes slow without a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.config.base import RayConfig
from common.config.ppo import Config
from common.errors import UserError
from common.memory import MIB
from common.model.size import ModelSize

# Room for what is kept, as a multiple of its bytes. Ray begins to move objects to a disk when 80 % of a store are full;
# the rest is for gaps between objects, and for deltas (generators.updates = "changes").
OVERHEAD = 1.3
LEAST_MIB = 1024  # of a store whose size is left out: evaluations and preference pairs need some, too

Stored = Mapping[str, int]  # bytes in the object store of one node, by what they are


def learner_store(cfg: Config, model: ModelSize) -> Stored:
    """The store of the node where rank 0 publishes: during a publication it has the old and the new weights.

    Rollouts stay in the store until the learner has learned from them, and there are no more than the buffer's slots.
    While a batch is learned from, its table is there, too."""
    return {"two versions of the weights": 2 * _version(model), "rollouts": _rollouts(cfg)}


def generator_store(cfg: Config, model: ModelSize) -> Stored:
    """The store of another node with generators: it holds the new weights and the generators' rollouts."""
    return {"a version of the weights": _version(model), "rollouts": _rollouts(cfg)}


def sampling_store(cfg: Config) -> Stored:
    """The store of a command that only samples responses: two batches at most."""
    return {"rollouts": _rollouts(cfg)}


def _version(model: ModelSize) -> int:
    return int(OVERHEAD * 2 * model.parameters)


def _rollouts(cfg: Config) -> int:
    batch = cfg.rollouts_per_step * cfg.longest_rollout_bytes
    buffered = min(cfg.buffer_mib * MIB, cfg.max_staleness * batch)
    return int(OVERHEAD * (buffered + 2 * batch))  # the batch that is learned from, and its table


def sized(cfg: RayConfig, stores: Sequence[Stored]) -> RayConfig:
    """The settings of a cluster that is started for processes with these stores. Fills in the store's size if it was
    left out. Raises UserError if the given size is too small."""
    largest = max(stores, key=lambda store: sum(store.values()), default={})
    wanted = -(-sum(largest.values()) // MIB)
    if cfg.object_store_mib is None:
        return cfg.model_copy(update={"object_store_mib": max(LEAST_MIB, wanted)})
    if cfg.object_store_mib < wanted:
        raise UserError(
            f"ray.object_store_mib ({cfg.object_store_mib}) must be at least {wanted}, for {listed(largest)}; raise it "
            "or leave it out, lower buffer_mib or rollouts_per_step, or use a smaller model"
        )
    return cfg


def listed(store: Stored) -> str:
    """The parts with their sizes, for messages."""
    return " and ".join(f"{name} ({-(-size // MIB)} MiB)" for name, size in store.items())
