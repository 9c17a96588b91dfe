"""Chooses the size of micro-batches on a GPU if the user leaves it out: the fastest size that fits its memory.

Runs in the driver.

RUN/config.toml records the size. A resumed run reads it there. So with the same layout of devices it computes the same
bits, also on GPUs with more memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from actors.generation.kv_cache import USABLE
from common.config.ppo import Config
from common.config.reward_model import RewardTrainingConfig
from common.config.training import CPU_TOKENS, GPU_TOKENS
from common.model.size import ModelSize
from deploy.plan.needs import Phases
from deploy.plan.placement import Node, place

Trains = TypeVar("Trains", Config, RewardTrainingConfig)

# From this many weights on, arithmetic takes longer than the start of kernels, and larger micro-batches gain little:
# docs/performance.md has the times.
LARGE_MODEL = 1_000_000_000
FASTEST, FASTEST_OF_LARGE = 32_768, 16_384  # tokens


def with_micro_batches(
    cfg: Trains, model: ModelSize, nodes: Sequence[Node], phases: Callable[[Trains], Phases]
) -> Trains:
    """Fills in learner.micro_batch_tokens in the settings of a command that trains `model`. A given number stays. On
    GPUs it is the largest of `sizes` with which the ranks in `phases` fit the nodes. If none fits, it is the smallest,
    and the run is refused later."""
    if cfg.learner.micro_batch_tokens is not None or not cfg.learner.gpus:
        return cfg
    chosen = cfg
    for tokens in sizes(model, nodes):
        chosen = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"micro_batch_tokens": tokens})})
        if ranks_fit(phases(chosen), nodes):
            break
    return chosen


def sizes(model: ModelSize, nodes: Sequence[Node]) -> Iterator[int]:
    """The sizes to try, largest first. Where no node says how much memory its GPUs have, only GPU_TOKENS."""
    if not any(node.gpu_memory for node in nodes):
        yield GPU_TOKENS
        return
    tokens = FASTEST if model.parameters < LARGE_MODEL else FASTEST_OF_LARGE
    while tokens >= CPU_TOKENS:
        yield tokens
        tokens //= 2


def ranks_fit(phases: Phases, nodes: Sequence[Node]) -> bool:
    """True if every rank fits its share of a GPU with the margin that an engine leaves free (1 - USABLE). Without a
    margin a rank could run out of memory, because micro-batches of different sizes leave gaps."""
    ranks = [need for processes in phases for need in processes if "activations" in need.device]
    return place(ranks, [replace(node, gpu_memory=int(USABLE * node.gpu_memory)) for node in nodes]).fits
