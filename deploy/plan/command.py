"""`ratchet plan`: shows where the processes of a PPO run would run and what memory they would take, before anything
starts.

Runs in the driver. It decides with the same functions as `ratchet train` (deploy/plan/plan.py). It writes no run
directory and reads no prompts. For a model on the hub, it downloads only the config.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from common.config.ppo import Config
from common.errors import UserError
from common.files import write_whole
from common.memory import MIB
from common.model.size import ModelSize
from deploy.plan.capacity import check_engine_build, check_kv_cache
from deploy.plan.machines import Described, check_own_store, joins, machines
from deploy.plan.models import policy_size, reward_model_sizes, scoring_models
from deploy.plan.needs import Phases, ScoringModel, needs
from deploy.plan.object_store import LEAST_MIB, sized
from deploy.plan.placement import Node
from deploy.plan.plan import Plan
from deploy.plan.planner import Planner, without_stores
from deploy.plan.step import Typical, plan_step
from deploy.plan.step_table import seconds_tables, traffic_table
from deploy.plan.suggest import DoesNotFit, suggest
from deploy.plan.table import memory_by_parts, size, who_runs_where
from deploy.screen.console import Output


@dataclass(frozen=True)
class Models:
    """The sizes of a run's models, from their configs alone."""

    policy: ModelSize
    rewards: Sequence[ScoringModel]

    @classmethod
    def of(cls, cfg: Config) -> Models:
        """Raises UserError for a model that is not there."""
        return cls(policy_size(cfg.model), scoring_models([*cfg.reward.sources, *cfg.evaluation.judges]))

    def phases(self, cfg: Config) -> Phases:
        """The processes of the run, which all run at the same time."""
        return [needs(cfg, self.policy, self.rewards)]

    def planner(self, cfg: Config, described: Described, nodes: Sequence[Node]) -> Planner[Config]:
        """A planner of configs on these nodes. On a running cluster the object stores keep their sizes. Otherwise each
        config gets stores of the size that it needs."""
        starts = not joins(described, cfg.ray)
        free = without_stores(nodes) if starts else nodes
        return Planner(free, self.phases, trains=self.policy, engines=self.policy, starts_stores=starts)


@dataclass(frozen=True)
class Section:
    """A part of the plan, as the screen shows it and as --json prints it."""

    key: str
    data: Any
    shown: Sequence[RenderableType]


def run_plan(cfg: Config, described: Described, *, typical: Typical | None = None, as_json: bool = False) -> int:
    """Prints the plan of a run. Returns the exit code: 0 if it fits, 1 if not. Raises UserError."""
    typical = typical or Typical()
    typical.check(cfg)
    models = Models.of(cfg)
    check_kv_cache(cfg.generators, models.policy, max_tokens=cfg.max_sequence_tokens)
    if described:
        described.check()
    else:
        check_engine_build(cfg.generators)
    store = 0 if joins(described, cfg.ray) else store_mib(cfg, models)  # running stores have their sizes
    with machines(described, cfg.ray, store) as nodes:
        planner = models.planner(cfg, described, nodes)
    plan = planner.plan(cfg)
    remedy = None if plan.fits else planner.remedy(cfg)
    why_not = plan.refusal or _store_refusal(plan, described)
    sections = plan_sections(plan, models, typical, why_not, remedy)
    if as_json:
        print(json.dumps({section.key: section.data for section in sections}, indent=2))
    else:
        console = Output()
        for section in sections:
            for shown in section.shown:
                console.print(shown)
    return 0 if why_not is None else 1


def run_suggest(
    tree: Mapping[str, Any],
    described: Described,
    title: str,
    *,
    fixed: Collection[str] = (),
    out: Path | None = None,
    typical: Typical | None = None,
) -> int:
    """Prints a config with which the run of the given settings fits, or writes it to a new file. Returns the exit code:
    0 if there is one, 1 if not. `fixed`: keys that keep their values. Raises UserError."""
    if out is not None and out.exists():
        raise UserError(f"--out ({out}) exists already; name a new file")
    cfg = Config.model_validate(tree)
    (typical or Typical()).check(cfg)
    models = Models.of(cfg)
    if described:
        described.check()
    with machines(described, cfg.ray, 0) as nodes:
        planner = models.planner(cfg, described, nodes)
    try:
        found = suggest(
            tree,
            planner,
            models.policy,
            fixed,
            reward_models=reward_model_sizes(cfg.reward.sources),
            typical=typical,
        )
    except DoesNotFit as error:
        print(error)
        return 1
    if (why_not := _store_refusal(found.plan, described)) is not None:
        print(why_not)
        return 1
    text = found.to_toml(title)
    if out is None:
        print(text, end="")
        return 0
    try:
        write_whole(out, text)
    except OSError as error:
        raise UserError(f"--out ({out}) cannot be written ({error.strerror}); name another file") from None
    for key, reason in found.reasons.items():
        print(f"{key}: {reason}")
    print(f"written to {out}; it fits")
    return 0


def store_mib(cfg: Config, models: Models) -> int:
    """The size of an object store that is started for the run, MiB. Raises UserError if the given one is too small."""
    [processes] = models.phases(cfg)
    return sized(cfg.ray, [need.store for need in processes]).object_store_mib or LEAST_MIB


def _store_refusal(plan: Plan[Config], described: Described) -> str | None:
    """Why this machine has no place for the object store of a plan that fits otherwise. None if it has one, or if the
    plan is for other machines."""
    if described or joins(described, plan.cfg.ray) or not plan.fits:
        return None
    try:
        check_own_store(plan.nodes[0].store // MIB)
    except UserError as error:
        return str(error)
    return None


def plan_sections(
    plan: Plan[Config], models: Models, typical: Typical, why_not: str | None, remedy: str | None = None
) -> list[Section]:
    """The parts of the plan in the order of the screen. `why_not`: the reason why it does not fit. `remedy`: what would
    make it fit."""
    remedies = [] if remedy is None else [Section("remedy", remedy, [f"{remedy[0].upper()}{remedy[1:]}."])]
    step = _step(plan, models, typical) if why_not is None else []
    return [_memory(plan), _stores(plan), *step, _verdict(plan, why_not), *remedies]


def _memory(plan: Plan[Config]) -> Section:
    [placement] = plan.placements
    places = {place.need.name: place for place in placement.places}
    processes = [
        {
            "name": need.name,
            "section": need.section,
            "node": places[need.name].node if need.name in places else None,
            "waits_for_a_node": need in placement.waiting,
            "gpus": list(places[need.name].gpus) if need.name in places else [],
            "cpus": need.cpus,
            "gpu_share": need.gpus,
            "lent_gpu_share": need.lent,
            "host": dict(need.host),
            "device": dict(need.device),
            "host_bytes": need.memory,
            "device_bytes": sum(need.device.values()),
            "store": dict(need.store),
        }
        for need in plan.phases[0]
    ]
    tokens = plan.cfg.learner.token_budget
    data = {
        "nodes": [vars(node) for node in plan.nodes],
        "processes": processes,
        "micro_batch_tokens": tokens,
    }
    names = {"activations": f"activations (micro-batches of {tokens} tokens)"}
    return Section("placement", data, [who_runs_where(placement), *memory_by_parts(plan.phases[0], names)])


def _stores(plan: Plan[Config]) -> Section:
    """What the object stores of the nodes must have room for."""
    learner, *others = plan.phases[0]
    stores = {"the learner's node": learner.store}
    if generators := [need for need in others if need.store]:
        stores["another node with generators"] = generators[0].store
    lines = []
    for where, store in stores.items():
        parts = " and ".join(f"{name} ({size(taken)})" for name, taken in store.items())
        lines.append(f"Object store of {where}: {size(sum(store.values()))} for {parts}")
    return Section("object_stores", {where: dict(store) for where, store in stores.items()}, lines)


def _step(plan: Plan[Config], models: Models, typical: Typical) -> list[Section]:
    seconds, flows = plan_step(plan, models.policy, typical)
    return [
        Section("seconds", asdict(seconds), seconds_tables(seconds)),
        Section("traffic", [asdict(flow) for flow in flows], [traffic_table(flows)]),
    ]


def _verdict(plan: Plan[Config], why_not: str | None) -> Section:
    verdict = "[bold green]It fits.[/]" if why_not is None else f"[bold red]It does not fit:[/] {escape(why_not)}"
    waiting = [need.name for need in plan.waiting]
    if why_not is None and waiting:
        verdict = (
            f"[bold green]The run starts.[/] It then waits until the autoscaler has added nodes for "
            f"{', '.join(waiting)}, for at most {plan.cfg.ray.startup_timeout_s:g} s (ray.startup_timeout_s)."
        )
    data = {"fits": why_not is None, "why_not": why_not, "waits_for_a_node": waiting}
    return Section("verdict", data, [verdict])
