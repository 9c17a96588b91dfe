"""The kinds of runs, and what is done to each. Runs in the harness."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config.ppo import Config
from tests.fakes import tiny_config

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 100  # of tests.tasks:train_prompts


@dataclass(frozen=True)
class Blow:
    """Something done to a process of one target, when any process reaches the point, or after a random delay.

    KILL and STOP (frozen for good) are signals; PAUSE is a STOP that ends after a moment. CUT takes the network from a
    node for good, BLIP for a moment. FILL fills a disk.
    """

    target: str
    how: str = "KILL"  # KILL
    point: str = ""

    @property
    def role(self) -> str:
        """The name under which its recovery is reported."""
        suffix = {"KILL": "", "STOP": " frozen", "PAUSE": " paused", "CUT": " cut off", "BLIP": " cut off for a moment"}
        return self.target + suffix.get(self.how, " full")


Case = tuple[Blow, ...]  # the later ones come while the run recovers from the earlier ones


def _each(target: str, *points: str, how: str = "KILL") -> list[Case]:
    return [(Blow(target, how, point),) for point in points]


# In the order in which a step comes to them.
STEP_POINTS = (
    "before the journal",
    "after the journal",
    "update",
    "publication",
    "swap",
    "checkpoint",
    "before the marker",
)
GENERATOR = [
    *_each("generator", "", "generation", "bucket staged", "swap"),
    *_each("generator", "", "bucket staged", how="STOP"),
    (Blow("generator"), Blow("generator", point="join")),
]
SCORING = [
    *_each("reward", "", "scoring"),
    *_each("reference", "", "measuring"),
    *_each("reward", "", how="STOP"),
    *_each("reference", "", how="STOP"),
]
LEARNER = [
    *_each("learner", "", *STEP_POINTS),
    *_each("learner", "", "update", how="STOP"),
    (Blow("learner"), Blow("learner", point="rank joins")),
]
DRIVER = [
    *_each("driver", "", *STEP_POINTS),
    *_each("driver", "", how="PAUSE"),
    *_each("driver", "", how="STOP"),
    (Blow("driver"), Blow("driver", point="recovery")),
    (Blow("driver"), Blow("driver", point="restore")),
    (Blow("learner"), Blow("driver", point="rebuild")),
    (Blow("generator"), Blow("driver", point="join")),
]
MACHINE = [
    *_each("everything", "", "after the journal", "before the marker"),
    (Blow("driver"), Blow("everything", point="recovery")),
    *_each("gcs", ""),
    *_each("raylet", ""),
    *_each("gcs", "", how="STOP"),
    *_each("raylet", "", how="STOP"),
]
ENGINE = [
    *_each("engine", "", "generation", "bucket staged"),
    *_each("engine", "", "swap", how="STOP"),
    *_each("generator", "generation"),
]
NODE = [
    *_each("node", "", "generation", "bucket staged"),
    *_each("node", "", how="STOP"),
    *_each("node", "", "generation", how="CUT"),
    *_each("node", "", "bucket staged", how="BLIP"),
    *_each("driver", "swap"),
]
DISK = [*_each("disk", "", "before the journal", "checkpoint", how="FILL")]


@dataclass(frozen=True)
class Scenario:
    """A kind of run and the cases for it."""

    name: str
    cases: Sequence[Case]
    settings: dict[str, Any] = field(default_factory=dict)
    place: str = ""  # see places.py
    # Of each run. Asynchronous ones continue while a process is replaced, so they need more for as many kills.
    steps: int = 150
    weight: float = 1.0  # its share of the kills, among the scenarios

    def config(self, model: Path, *, seed: int, steps: int | None = None) -> Config:
        """Limits are short, so that a frozen process is noticed soon; all other limits are far longer than any work."""
        limits = {"timeout_s": 60, "probe_timeout_s": 6, "max_shortage_s": 180}
        tree: dict[str, Any] = {
            "seed": seed,
            "num_steps": steps or self.steps,
            "rollouts_per_step": 16,
            "max_staleness": 0,
            "sampling": {"max_new_tokens": 40},
            "optimizer": {"learning_rate": 2e-4, "value_head_learning_rate": 1e-3},
            "generators": {"dtype": "float32", "kv_cache_mib": 16, **limits},
            "reference": limits,
            "reward": limits,
            "learner": {"precision": "fp32", "cpus": 0.5, "timeout_s": 60, "probe_timeout_s": 6},
            "checkpoint": {"every": 7, "keep": 2},
            "evaluation": {"prompts": 4, "every": 25},
            "ray": {"dashboard": False, "object_store_mib": 128, "startup_timeout_s": 180, "max_silence_s": 15},
        }
        for section, values in self.settings.items():
            tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
        return tiny_config(model, **tree)

    @property
    def synchronous(self) -> bool:
        return not self.settings.get("max_staleness")


OVERLAPPED = {"max_staleness": 1, "generators": {"min": 1, "max": 2, "cpus": 0.5, "updates": "changes"}}
ON_NODES = {"max_staleness": 1, "generators": {"min": 1, "max": 2, "cpus": 1}}
ALL = [*GENERATOR, *SCORING, *LEARNER, *DRIVER, *MACHINE]
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("synchronous", ALL),
        Scenario("asynchronous", ALL, {**OVERLAPPED, "reward": {"min": 2}}, steps=400),
        Scenario("two-ranks", ALL, {"learner": {"ranks": 2}}),
        Scenario("two-ranks-asynchronous", ALL, {**OVERLAPPED, "learner": {"ranks": 2}}, steps=400),
        Scenario("split-engine", ENGINE, {"generators": {"tensor_parallel": 2, "cpus": 0}}, weight=0.15),
        Scenario("two-nodes", NODE, ON_NODES, place="nodes", steps=600, weight=0.25),
        Scenario("full-disk", DISK, place="disk", weight=0.1),
    )
}


def schedule(cases: Sequence[Case], kills: int, random_: random.Random) -> deque[Case]:
    """Cases with `kills` blows in all. Roles take turns: a role that dies again and again is replaced ever later."""
    chosen: deque[Case] = deque()
    left = kills
    while left > 0:
        for case in _in_turns(cases, random_):
            if left > 0:
                case = case[:left]
                chosen.append(case)
                left -= len(case)
    return chosen


def _in_turns(cases: Sequence[Case], random_: random.Random) -> list[Case]:
    """Every case once, in a random order in which neighbours have different targets as far as possible."""
    by_target: dict[str, list[Case]] = {}
    for case in random_.sample(list(cases), len(cases)):
        by_target.setdefault(case[-1].target, []).append(case)
    order: list[Case] = []
    while by_target:
        for target in random_.sample(sorted(by_target), len(by_target)):
            order.append(by_target[target].pop())
            if not by_target[target]:
                del by_target[target]
    return order


def shares(names: Sequence[str], kills: int) -> dict[str, int]:
    """The kills of each scenario, by weight; every one gets at least one while there are enough."""
    total = sum(SCENARIOS[name].weight for name in names)
    exact = {name: kills * SCENARIOS[name].weight / total for name in names}
    given = {name: int(share) for name, share in exact.items()}
    by_rest = sorted(names, key=lambda name: given[name] - exact[name])
    for name in by_rest[: kills - sum(given.values())]:
        given[name] += 1
    return given
