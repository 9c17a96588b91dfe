"""`ratchet plan --suggest`: settings with which a model can train on some machines, and the reason for each.

Runs in the driver; pure arithmetic. Of the layouts that fit, it takes one with about the shortest predicted step
(`_best`). The task and the algorithm stay as in the config. Adapters are trained instead of all weights only if nothing
else fits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tomli_w
from pydantic import ValidationError

from actors.generation.kv_cache import bytes_per_sequence, kv_cache_bytes
from common.config.ppo import Config
from common.config.sources import ModelSourceConfig
from common.errors import UserError
from common.model.size import ModelSize
from deploy.plan.layouts import Layout, Machines, layouts
from deploy.plan.micro_batches import ranks_fit
from deploy.plan.missing import missing_hardware
from deploy.plan.overlap import one_gpu
from deploy.plan.placement import Node
from deploy.plan.plan import Plan
from deploy.plan.planner import Planner
from deploy.plan.rates import KINDS, Rates, find_rates
from deploy.plan.seconds import step_seconds
from deploy.plan.step import Typical, cache_bytes
from deploy.plan.traffic import homes

# Tokens of a micro-batch, and rollouts in an engine's cache, that a layout should have. If none has, any will do.
GOOD_TOKENS, GOOD_ROLLOUTS = 4096, 16
# The part of a data sheet's rates that an engine is assumed to reach. It was not measured.
OF_DATA_SHEET = 0.5
NEAR = 1.1  # steps with a smaller ratio count as equal: predictions on CPUs were up to 23 % off (docs/plan.md)
Found = tuple[Layout, Plan[Config]]
Timed = tuple[tuple[float, float], Found]  # with its seconds, see `_seconds`


class DoesNotFit(UserError):
    """No layout of a run fits the machines."""


@dataclass(frozen=True)
class Suggestion:
    """A config that fits, and the reasons of its settings."""

    plan: Plan[Config]
    tree: Mapping[str, Any]  # the settings that are given, as in a TOML file
    reasons: Mapping[str, str]  # by key

    def to_toml(self, title: str) -> str:
        """The config as a TOML file, with each reason next to its setting."""
        lines, section = [f"# {title}"], ""
        left_out = dict(self.reasons)
        for line in tomli_w.dumps(self.tree).splitlines():
            if line.startswith("["):
                key = section = line.strip("[]")
            else:
                key = ".".join(filter(None, [section, line.partition(" = ")[0]]))
            reason = left_out.pop(key, None)
            lines.append(f"{line}  # {reason}" if reason else line)
        lines += [f"# {key} is left out: {reason}" for key, reason in left_out.items()]
        return "\n".join(lines) + "\n"


def suggest(
    tree: Mapping[str, Any],
    planner: Planner[Config],
    model: ModelSize,
    fixed: Collection[str] = (),
    *,
    reward_models: Sequence[ModelSize] = (),
    typical: Typical | None = None,
) -> Suggestion:
    """A layout with which the config in `tree` fits the planner's machines, about the fastest one. `fixed`: keys that
    keep their values. `typical`: rates and rollouts that the seconds of a step are predicted for. Raises DoesNotFit, or
    UserError if no layout obeys the rules of the config with them."""
    Config.model_validate(tree)
    machines = Machines(planner.nodes)
    faults: list[Exception] = []
    planned = False
    typical = typical or Typical()
    # Measured rates replace those that the user does not give: a choice needs only their proportions.
    known: dict[str, Rates] = {kind.device: kind for kind in KINDS.values()}
    rates = {device: _expected(one) for device, one in (known | find_rates(typical.rates)).items()}

    for firsts, good in _first_choices(tree, planner, on_gpus=machines.gpus > 0):
        found = []
        for layout, plan in _plans(tree, firsts, fixed, planner, model, faults):
            planned = True
            if _fits(plan, planner) and (not good or _is_good(plan.cfg, model, machines)):
                found.append((layout, plan))
                if not machines.gpus:  # the largest KV cache
                    break
        if found:
            return _suggestion(tree, *_best(found, lambda plan: _seconds(plan, model, reward_models, rates, typical)))
    if faults and not planned:
        raise UserError(f"no layout for these machines obeys the rules of the config: {_in_words(faults[0])}")
    raise DoesNotFit(_refusal(tree, planner, model, fixed))


def _best(found: Sequence[Found], seconds: Callable[[Plan[Config]], tuple[float, float]]) -> Found:
    """The layout to suggest. `seconds`: see `_seconds`.

    First come the layouts with the fewest GPUs for each engine and the fewest nodes for the learner, because the effect
    of more was not measured. Then the shortest steps; steps that are NEAR the shortest count as equal. Of those, the
    layouts with the fewest GPUs for services alone, and then those with the most GPUs that train, because the rates of
    training were measured and those of engines were not."""

    def spread(plan: Plan[Config]) -> tuple[int, int]:
        return plan.cfg.generators.tensor_parallel, len(set(homes(plan.placements[0])["learner"]))

    least = min(spread(plan) for _, plan in found)
    timed = [(seconds(one[1]), one) for one in found if spread(one[1]) == least]
    fewest = min(_gpus_of_services(plan) for _, (_, plan) in _near(timed))
    timed = _near([(times, one) for times, one in timed if _gpus_of_services(one[1]) == fewest])
    return min(timed, key=lambda one: (-one[1][1].cfg.learner.ranks, one[0]))[1]


def _near(timed: Sequence[Timed]) -> list[Timed]:
    """Those whose step is NEAR the shortest one."""
    shortest = min(times[0] for times, _ in timed)
    return [(times, one) for times, one in timed if times[0] <= NEAR * shortest]


def _gpus_of_services(plan: Plan[Config]) -> int:
    """GPUs with processes of services alone."""
    return sum(not {"learner", "generators"} & set(sections) for sections in one_gpu(plan.placements[0]))


def _expected(rates: Rates) -> Rates:
    """The rates. Those of a data sheet for engines are multiplied by OF_DATA_SHEET."""
    sheet, part = rates.decoding, OF_DATA_SHEET
    if not sheet.data_sheet:
        return rates
    prefill, decode, read = (part * rate for rate in (sheet.prefill_per_s, sheet.decode_per_s, sheet.read_bytes_per_s))
    return replace(rates, decoding=replace(sheet, prefill_per_s=prefill, decode_per_s=decode, read_bytes_per_s=read))


def _seconds(
    plan: Plan[Config],
    model: ModelSize,
    reward_models: Sequence[ModelSize],
    rates: Mapping[str, Rates],
    typical: Typical,
) -> tuple[float, float]:
    """The predicted seconds of a step, and of all its phases together, for layouts with equal steps."""
    cfg, [placement] = plan.cfg, plan.placements
    found = step_seconds(
        _in_bfloat16(cfg),
        model,
        reward_models,
        rates,
        lengths=typical.lengths(cfg),
        cache_bytes=cache_bytes(cfg, model, plan.nodes),
        gpus=one_gpu(placement),
    )
    return found.step.seconds or math.inf, sum(phase.seconds or 0.0 for phase in found.phases)


def _in_bfloat16(cfg: Config) -> Config:
    """The config with all roles in bfloat16. Rates of float32 are not known, and a choice needs only proportions."""
    sources = [
        source.model_copy(update={"dtype": "bfloat16"}) if isinstance(source, ModelSourceConfig) else source
        for source in cfg.reward.sources
    ]
    changes: Mapping[str, Mapping[str, Any]] = {
        "learner": {"precision": "bf16"},
        "generators": {"dtype": "bfloat16"},
        "reference": {"dtype": "bfloat16"},
        "reward": {"sources": tuple(sources)},
    }
    return cfg.model_copy(
        update={section: getattr(cfg, section).model_copy(update=update) for section, update in changes.items()}
    )


def _first_choices(
    tree: Mapping[str, Any], planner: Planner[Config], *, on_gpus: bool
) -> Iterator[tuple[Sequence[Layout], bool]]:
    """Settings that the layouts of one round share, in two variants: activations are kept, or computed again. The best
    round is first: all weights before adapters, and for each of them, good layouts before any layout."""
    given = _given_counts(tree)
    if planner.starts_stores and "object_store_mib" in tree.get("ray", {}):
        given["ray.object_store_mib"] = (None, "the size that weights and rollouts need")
    why = "all weights fit these machines in no layout, so only adapters are trained"
    once: Layout = {"learner.gradient_checkpointing": (False, "activations have room")}
    twice: Layout = {"learner.gradient_checkpointing": (True, "far less memory; an update takes a quarter longer")}
    adapters: Layout = {"learner.lora.rank": (16, why)}
    for lora in [{}] if "lora" in tree.get("learner", {}) else [{}, adapters]:
        for good in (True, False) if on_gpus else (False,):
            yield [{**given, **lora, **once}, {**given, **lora, **twice}], good


def _given_counts(tree: Mapping[str, Any]) -> Layout:
    """Numbers of processes in the config. A layout replaces them."""
    replaced: Layout = {
        "generators.max": (None, "as many as generators.min"),
        "reference.min": (1, "one process serves all"),
        "reference.max": (None, "one process serves all"),
        "reward.min": (1, "one process serves all"),
        "reward.max": (None, "one process serves all"),
        "learner.min_ranks": (None, "all ranks are there"),
    }
    return {key: entry for key, entry in replaced.items() if key.split(".")[1] in tree.get(key.split(".")[0], {})}


def _plans(
    tree: Mapping[str, Any],
    firsts: Sequence[Layout],
    fixed: Collection[str],
    planner: Planner[Config],
    model: ModelSize,
    faults: list[Exception],
    *,
    every: bool = True,
) -> Iterator[tuple[Layout, Plan[Config]]]:
    """Every layout that the rules of the config allow, and its plan. The faults of the others go to `faults`.
    `every`: see `layouts`."""
    found = [(first, layout) for first in firsts for layout in _layouts(_with(tree, first), planner, model, every)]
    for first, layout in found:
        kept = {*fixed, "max_staleness"} if tree.get("max_staleness", 0) >= layout["max_staleness"][0] > 0 else fixed
        wanted = {key: value for key, value in {**first, **layout}.items() if key not in kept}
        try:
            yield wanted, planner.plan(Config.model_validate(_with(tree, wanted)))
        except (ValueError, UserError) as fault:
            faults.append(fault)


def _in_words(fault: Exception) -> str:
    return fault.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(fault, ValidationError) else str(fault)


def _layouts(tree: Mapping[str, Any], planner: Planner[Config], model: ModelSize, every: bool) -> Iterator[Layout]:
    """The layouts for the planner's machines. Sizes on a GPU are those of a config with all roles on one GPU."""
    machines = Machines(planner.nodes)
    shares = {"learner": 0.5, "generators": 0.3, "reference": 0.1, "reward": 0.1} if machines.gpus else {}
    on_one: Layout = {f"{section}.gpus": (share, "") for section, share in shares.items()}
    on_one |= {"max_staleness": (0, ""), "generators.sleep": (None, ""), "generators.kv_cache_mib": (None, "")}
    on_one |= {"learner.ranks": (1, ""), "learner.min_ranks": (None, ""), "generators.tensor_parallel": (1, "")}
    try:
        probe = Config.model_validate(_with(tree, on_one))
    except ValueError:  # some settings exclude adapters
        return
    yield from layouts(probe, machines, model, lambda cfg: planner.phases(cfg)[0], every=every)


def _with(tree: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The tree with the values of a layout. A value of None leaves its setting out."""
    new = copy.deepcopy(dict(tree))
    for key, (value, _) in layout.items():
        *sections, leaf = key.split(".")
        part = new
        for name in sections:
            part = part.setdefault(name, {})
        if value is None:
            part.pop(leaf, None)
        else:
            part[leaf] = value
    return new


def _fits(plan: Plan[Config], planner: Planner[Config]) -> bool:
    """True if the plan fits these machines without further nodes, and the ranks keep the margin of `ranks_fit`."""
    return plan.fits and not plan.waiting and ranks_fit(planner.phases(plan.cfg), plan.nodes)


def _is_good(cfg: Config, model: ModelSize, machines: Machines) -> bool:
    """True if an update and an engine work on enough at once to keep a GPU busy."""
    _, sequence = bytes_per_sequence(cfg.generators, model, max_tokens=cfg.max_sequence_tokens)
    rollouts = _cache(cfg, model, machines) // sequence
    return cfg.learner.token_budget >= GOOD_TOKENS and rollouts >= min(GOOD_ROLLOUTS, cfg.rollouts_per_step)


def _cache(cfg: Config, model: ModelSize, machines: Machines) -> int:
    """Bytes of an engine's KV cache, over all its GPUs; 0 if it cannot hold one sequence."""
    engines, tokens = cfg.generators, cfg.max_sequence_tokens
    try:
        of_each = kv_cache_bytes(engines, model, max_tokens=tokens, device_memory=machines.gpu_memory)
    except UserError:
        return 0
    return of_each * engines.tensor_parallel


def _suggestion(tree: Mapping[str, Any], layout: Layout, plan: Plan[Config]) -> Suggestion:
    """With the size of micro-batches that the plan filled in."""
    tokens = plan.cfg.learner.micro_batch_tokens
    if tokens is not None and "learner.micro_batch_tokens" not in layout:
        layout = {**layout, "learner.micro_batch_tokens": (tokens, "the largest that is faster and fits a rank's GPU")}
    reasons = {key: reason for key, (_, reason) in layout.items()}
    return Suggestion(plan, _with(tree, layout), reasons)


def _refusal(tree: Mapping[str, Any], planner: Planner[Config], model: ModelSize, fixed: Collection[str]) -> str:
    """The message that the config fits in no layout, with what is missing for the layouts that take least."""
    *_, ([*_, least], _) = _first_choices(tree, planner, on_gpus=False)

    def fits(nodes: Sequence[Node]) -> bool:
        there = replace(planner, nodes=nodes)
        return any(_fits(plan, there) for _, plan in _plans(tree, [least], fixed, there, model, [], every=False))

    adapters = ", not even with adapters instead of all weights" if "learner.lora.rank" in least else ""
    return (
        f"no layout of this run fits these machines{adapters}; it {missing_hardware(planner.nodes, fits)}; or use a "
        "smaller model or shorter sequences"
    )
