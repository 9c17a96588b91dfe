"""Runs a training in passes: starts its ranks, and connects them with the screen and the sinks. Runs in the driver.

`ratchet train-reward` and `ratchet train-critic` are such trainings. learner/loop/passes.py has their loop.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from actors.pool.ray_actor import actor
from common.config.ppo import Config
from common.config.reward_model import RewardTrainingConfig
from deploy.ending import signals
from deploy.session import step_grace_s
from deploy.sinks.following import following
from learner.ranks.rank_group import RankGroup

E = TypeVar("E")


class Ranks(NamedTuple):
    """The processes that train."""

    group: type[RankGroup]
    trainer: type  # the class in each rank
    arguments: Sequence[Any]  # of the trainer, after the config


class PassScreen(Protocol):
    """The screen of a training in passes."""

    def step(self, record: dict[str, Any]) -> None: ...

    def evaluation(self, evaluation: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, message: str) -> None: ...


def train_in_passes(
    cfg: Config | RewardTrainingConfig,
    directory: Path,
    ranks: Ranks,
    train: Callable[..., Coroutine[Any, Any, list[E]]],
    progress: PassScreen,
    accepted: Callable[[], None],
) -> list[E]:
    """Starts the ranks, trains, stops the ranks, and returns all evaluations. `accepted` is called once the ranks have
    accepted the model. `train` gets the group, and as keywords the callbacks of `learner.loop.passes.PassTraining`."""

    async def training(wake_sinks: Callable[[], None]) -> list[E]:
        group = ranks.group(
            lambda rank: actor(ranks.trainer, cfg.learner, f"{ranks.group.role}({rank})").remote(cfg, *ranks.arguments),
            cfg.learner,
            startup_timeout_s=cfg.ray.startup_timeout_s,
            report=progress.warn,
            tell=progress.note,
        )

        def stepped(record: dict[str, Any]) -> None:
            progress.step(record)
            wake_sinks()

        def evaluated(evaluation: E) -> None:
            progress.evaluation(evaluation)
            wake_sinks()

        try:
            await group.start()
            accepted()
            return await train(group, on_step=stepped, on_evaluation=evaluated, report=progress.warn)
        finally:
            group.stop()

    with following(cfg.logging, directory, cfg, tell=progress.note, report=progress.warn) as wake_sinks:
        return signals.run(training(wake_sinks), grace_s=step_grace_s(cfg))
