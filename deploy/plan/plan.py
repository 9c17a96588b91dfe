"""The plan of a command: its settings on these nodes, and who runs where. Runs in the driver; pure arithmetic.

`ratchet plan` shows it. The commands that start processes decide with the same functions: deploy/session.py refuses a
plan that does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.model.size import ModelSize
from deploy.plan.capacity import refusal
from deploy.plan.micro_batches import with_micro_batches
from deploy.plan.needs import Need, Phases
from deploy.plan.placement import Node, Placement, place

AnyConfig = TypeVar("AnyConfig", Config, RewardTrainingConfig, PairSamplingConfig)


@dataclass(frozen=True)
class Plan(Generic[AnyConfig]):
    """The settings of a command, and the places of its processes."""

    cfg: AnyConfig
    nodes: Sequence[Node]
    phases: Phases
    placements: Sequence[Placement]  # one for each phase

    @property
    def fits(self) -> bool:
        """True if the processes of every phase have places, or wait for nodes of the autoscaler."""
        return all(placement.fits for placement in self.placements)

    @property
    def waiting(self) -> Sequence[Need]:
        """The processes that wait for a node in the first phase that has any."""
        return next((placement.waiting for placement in self.placements if placement.waiting), ())

    @property
    def refusal(self) -> str | None:
        """The reason why it does not fit. None if it does."""
        return next(filter(None, map(refusal, self.placements)), None)


def make_plan(
    cfg: AnyConfig,
    nodes: Sequence[Node],
    phases: Callable[[AnyConfig], Phases],
    *,
    trains: ModelSize | None = None,
    autoscaler: bool = False,
) -> Plan[AnyConfig]:
    """Plans a command on these nodes. Each of `phases` lists, for a config, the processes that run at the same time.
    `trains`: the model whose micro-batches get a size if the config leaves it out. `autoscaler`: it adds nodes for
    processes that have no room."""
    if trains is not None and not isinstance(cfg, PairSamplingConfig):
        cfg = with_micro_batches(cfg, trains, nodes, phases)
    processes = phases(cfg)
    return Plan(cfg, nodes, processes, [place(phase, nodes, autoscaler=autoscaler) for phase in processes])
