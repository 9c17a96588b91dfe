"""Plans several configs on the same machines: the run's config, changed ones, and suggested ones.

Runs in the driver; pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic

from common.config.description import changeable
from common.config.ppo import Config
from common.errors import UserError
from common.memory import MIB
from common.model.size import ModelSize
from deploy.plan.capacity import check_kv_cache
from deploy.plan.change import Change, smallest_change
from deploy.plan.micro_batches import ranks_fit
from deploy.plan.missing import missing_hardware
from deploy.plan.needs import Phases
from deploy.plan.object_store import sized
from deploy.plan.placement import Node
from deploy.plan.plan import AnyConfig, Plan, make_plan


def without_stores(nodes: Sequence[Node]) -> list[Node]:
    """The nodes before their object stores start."""
    return [replace(node, memory=node.memory + node.store, store=0) for node in nodes]


@dataclass(frozen=True)
class Planner(Generic[AnyConfig]):
    """The machines, and a function that lists the processes of a config."""

    nodes: Sequence[Node]
    phases: Callable[[AnyConfig], Phases]
    trains: ModelSize | None = None  # the model whose micro-batches get a size
    engines: ModelSize | None = None  # the model in the engines
    starts_stores: bool = False  # the nodes have no object stores yet: each gets one of the size that a config needs

    def plan(self, cfg: AnyConfig) -> Plan[AnyConfig]:
        """The plan of a config. Raises UserError for one that no machine could run."""
        autoscaler = cfg.ray.autoscaler and not self.starts_stores  # that of a running cluster
        return make_plan(cfg, self._with_stores(cfg), self.phases, trains=self.trains, autoscaler=autoscaler)

    def fits(self, cfg: AnyConfig) -> bool:
        """True if the config has a plan that fits."""
        try:
            return self.plan(cfg).fits
        except UserError:
            return False

    def leaves_margin(self, cfg: AnyConfig) -> bool:
        """True if the config fits, and the ranks keep the margin of `ranks_fit`. Sizes of micro-batches that the plan
        chooses keep it; sizes that the user gives may not."""
        try:
            plan = self.plan(cfg)
        except UserError:
            return False
        return plan.fits and ranks_fit(plan.phases, plan.nodes)

    def check(self, cfg: AnyConfig, *, resume: bool = False) -> AnyConfig:
        """The config with the sizes that the plan fills in. Raises UserError, with the smallest change, if it does not
        fit. `resume`: only settings of a run that continues may change."""
        plan = self.plan(cfg)
        if not plan.fits:
            raise UserError(f"{plan.refusal}; {self.remedy(cfg, resume=resume)}")
        return plan.cfg

    def remedy(self, cfg: AnyConfig, *, resume: bool = False) -> str:
        """The smallest change that makes a config fit, or the hardware that is missing, in words. A change with which
        the ranks keep their margin comes before all others."""
        keys = tuple(changeable(type(cfg)))  # those of whole sections end with a dot
        holds = self._cache_holds(cfg)

        def smallest(fits: Callable[[AnyConfig], bool]) -> Change | None:
            return smallest_change(
                cfg,
                lambda other: fits(other) and self._cache_holds(other) >= holds,
                self.engines,
                lambda key: not resume or key.startswith(keys),
            )

        change = smallest(self.leaves_margin) or smallest(self.fits)
        if change is not None:
            return f"the smallest change that fits: {change}"
        missing = missing_hardware(self.nodes, lambda nodes: replace(self, nodes=nodes).fits(cfg))
        layouts = "; ratchet plan --suggest tries whole layouts" if isinstance(cfg, Config) and not resume else ""
        return f"no change of one or two settings fits; the run {missing}{layouts}"

    def _cache_holds(self, cfg: AnyConfig) -> bool:
        """True if an engine's KV cache has room for one sequence, as far as that is known."""
        if self.engines is None or not isinstance(cfg, Config):
            return True
        try:
            check_kv_cache(cfg.generators, self.engines, max_tokens=cfg.max_sequence_tokens)
        except UserError:
            return False
        return True

    def _with_stores(self, cfg: AnyConfig) -> list[Node]:
        if not self.starts_stores:
            return list(self.nodes)
        needed = sized(cfg.ray, [need.store for processes in self.phases(cfg) for need in processes])
        store = (needed.object_store_mib or 0) * MIB
        return [replace(node, memory=max(0, node.memory - store), store=store) for node in self.nodes]
