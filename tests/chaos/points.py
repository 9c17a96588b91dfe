"""Named points of the protocol at which a process of a run under test waits for the harness.

Runs in every Python process of the run: tests/site/sitecustomize.py calls `install`, so the product needs no hooks. The
functions at the points are wrapped when their module is imported. A wrapped function costs one failed `open` until the
harness arms its point.

The harness writes the name of a point to CHAOS_POINTS/armed. The first process that reaches the point renames that file
to reached-PID and waits until the harness, which kills something meanwhile, removes it.
"""

from __future__ import annotations

import faulthandler
import functools
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

WAIT_S = 30.0  # a process that the harness forgot continues


class Point(NamedTuple):
    """A function, and whether the point is before its call or after it."""

    module: str
    function: str
    after: bool = False


POINTS = {
    "before the journal": Point("learner.loop.journal", "Journal.append"),
    "after the journal": Point("learner.loop.journal", "Journal.append", after=True),
    "update": Point("learner.ppo.learner", "Learner.update"),
    "publication": Point("actors.pool.roles", "GeneratorPool.load"),
    "bucket staged": Point("actors.generation.generator", "Generator.stage", after=True),
    "swap": Point("actors.generation.generator", "Generator.swap"),
    "checkpoint": Point("learner.ranks.checkpoint", "save_checkpoint"),
    "before the marker": Point("learner.loop.checkpoints", "write_marker"),
    "rank joins": Point("learner.ranks.trainer", "Trainer.join"),
    "join": Point("actors.pool.loading", "WeightLoader.catch_up"),
    "generation": Point("actors.generation.generator", "Generator.generate"),
    "scoring": Point("actors.scoring.reward", "Reward.score"),
    "measuring": Point("actors.scoring.reference", "ReferencePolicy.logprobs"),
    "restore": Point("learner.ranks.trainer", "Trainer.restore"),
    "recovery": Point("learner.loop.recovery", "recover"),
    "rebuild": Point("learner.ranks.group", "LearnerGroup.rebuild"),
    "policy written": Point("learner.ppo.learner", "Learner.save_policy", after=True),
}


def install() -> None:
    """Wraps the functions of all points in modules that this process imports from now on. SIGUSR2 writes the stacks of
    all threads to CHAOS_POINTS/stacks-PID."""
    sys.meta_path.insert(0, _Finder())
    with suppress(OSError, ValueError):
        stacks = open(f"{os.environ['CHAOS_POINTS']}/stacks-{os.getpid()}", "w")  # noqa: SIM115 - open for good
        faulthandler.register(signal.SIGUSR2, stacks)


class _Finder:
    """Finds the modules of POINTS as the other finders do, and wraps their functions once they have run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        points = {title: point for title, point in POINTS.items() if point.module == name}
        if not points:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                for title, point in points.items():
                    with suppress(AttributeError):  # a point that is not there is never reached, which is reported
                        wrap(module, title, point)

            spec.loader.exec_module = exec_module
        return spec


def wrap(module: Any, title: str, point: Point) -> None:
    """Replaces the point's function. The new one is of the same kind, because Ray looks at the kind of a method."""
    *owners, name = point.function.split(".")
    owner = functools.reduce(getattr, owners, module)
    function = getattr(owner, name)
    setattr(
        owner,
        name,
        _asynchronous(function, title, point)
        if inspect.iscoroutinefunction(function)
        else _plain(function, title, point),
    )


def _plain(function: Callable, title: str, point: Point) -> Callable:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not point.after:
            reach(title)
        result = function(*args, **kwargs)
        if point.after:
            reach(title)
        return result

    return wrapped


def _asynchronous(function: Callable, title: str, point: Point) -> Callable:
    @functools.wraps(function)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not point.after:
            reach(title)
        result = await function(*args, **kwargs)
        if point.after:
            reach(title)
        return result

    return wrapped


def reach(title: str) -> None:
    """If this point is armed, waits here, which blocks the whole event loop, until the harness has killed."""
    directory = os.environ["CHAOS_POINTS"]
    with suppress(OSError):
        with open(f"{directory}/armed", encoding="utf-8") as armed:
            if armed.read() != title:
                return
        reached = f"{directory}/reached-{os.getpid()}"
        os.rename(f"{directory}/armed", reached)  # fails if another process was first
        deadline = time.monotonic() + WAIT_S
        while os.path.exists(reached) and time.monotonic() < deadline:
            time.sleep(0.002)
