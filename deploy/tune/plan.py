"""DIR/plan.json: what a tuning will do. It is made and checked before anything starts. Runs in the driver.

Every start of the command reads the same plan, so a continued tuning does not draw values again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config.loading import load_config, with_absolute_files
from common.config.overrides import as_overrides, toml_text
from common.config.ppo import Config
from common.errors import UserError
from common.files import write_json
from deploy.tune.halving import rungs
from deploy.tune.metric import check_key, checked_metric
from deploy.tune.space import Choices, Range, Space, draw, parse_space

EVALUATIONS = 6  # fewest evaluations of a trial, if the config asks for none between start and end
MOST_TRIALS = 1000
MOST_SEEDS = 100
# These save disk: a tuning keeps many runs, few of which are trained further, and optimizer state is two thirds of a
# checkpoint. A value on the command line overrides them.
_SMALL = ("checkpoint.keep=1", "checkpoint.keep_optimizer_at_end=false")


@dataclass(frozen=True)
class Plan:
    """A tuning."""

    spaces: tuple[str, ...]  # KEY=SPACE of each key whose value differs between trials
    trials: tuple[dict[str, Any], ...]  # the settings of each trial, by key
    metric: str
    num_steps: int
    seed: int
    every: int  # steps between evaluations
    given: dict[str, Any]  # the config's own values of settings that a tuning overrides; best.toml has these again
    rungs: tuple[int, ...]  # steps at which ASHA compares; empty: every trial runs to its end
    finalists: int
    seeds: int

    @property
    def keys(self) -> list[Space]:
        return [parse_space(text) for text in self.spaces]

    def write(self, directory: Path) -> None:
        write_json(directory / "plan.json", asdict(self))

    @classmethod
    def read(cls, directory: Path) -> Plan:
        """Raises UserError if the directory has no plan."""
        try:
            plan = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
            lists = {key: tuple(plan[key]) for key in ("spaces", "trials", "rungs")}
            return cls(**{**plan, **lists})
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(
                f"{directory} has no plan.json of ratchet tune; name a directory that the command has made, or begin "
                "again with --force"
            ) from None


def make_plan(
    config: Path,
    arguments: Sequence[str],
    *,
    trials: int,
    metric: str | None,
    finalists: int,
    seeds: int,
    keep_all: bool,
) -> tuple[Plan, Config]:
    """The plan, and the config that all trials start from. `arguments`: KEY=SPACE, or key=value for all trials. Raises
    UserError unless every trial has a valid config."""
    if trials > MOST_TRIALS:
        raise UserError(f"--trials ({trials}) must not exceed {MOST_TRIALS}; try fewer, then again around the best one")
    if seeds > MOST_SEEDS:
        raise UserError(f"--seeds ({seeds}) must not exceed {MOST_SEEDS}; a finalist rarely needs more than 5")
    spaces = [_with_absolute_files(argument, parse_space(argument), config) for argument in arguments]
    differing = [(text, space) for text, space in spaces if not _is_setting(space)]
    if not differing:
        raise UserError(
            "name at least one key with several values, such as ppo.clip_eps=0.05,0.1,0.2 or "
            "optimizer.learning_rate=log:1e-6..1e-4"
        )
    _check_once([space.key for _, space in spaces], {space.key for _, space in differing})
    settings = [text for text, space in spaces if _is_setting(space)]
    cfg = load_config(config, settings, Config)
    if not cfg.evaluation.prompts or cfg.prompts.heldout is None:
        raise UserError("trials are compared on held-out prompts: set prompts.heldout and evaluation.prompts above 0")
    metric = checked_metric(metric, cfg)
    for _, space in differing:
        check_key(space.key, metric, cfg)
    every = cfg.evaluation.every or max(1, cfg.num_steps // EVALUATIONS)
    fixed = [*_SMALL, *settings, f"evaluation.every={every}"]
    drawn = draw([space for _, space in differing], trials, seed=cfg.seed)
    configs = [_checked(config, fixed, settings, number, len(drawn)) for number, settings in enumerate(drawn, 1)]
    _check_different(drawn, configs)
    plan = Plan(
        spaces=tuple(text for text, _ in differing),
        trials=tuple(drawn),
        metric=metric,
        num_steps=cfg.num_steps,
        seed=cfg.seed,
        every=every,
        given={
            "evaluation.every": cfg.evaluation.every,
            "checkpoint.keep": cfg.checkpoint.keep,
            "checkpoint.keep_optimizer_at_end": cfg.checkpoint.keep_optimizer_at_end,
        },
        rungs=() if keep_all else tuple(rungs(_first_rung(configs, every), cfg.num_steps)),
        finalists=min(finalists, len(drawn)),
        seeds=seeds,
    )
    return plan, load_config(config, fixed, Config)


def _is_setting(space: Space) -> bool:
    return isinstance(space, Choices) and len(space.values) == 1


def _with_absolute_files(text: str, space: Space, config: Path) -> tuple[str, Space]:
    """The argument with absolute paths of files, because a tuning may continue in another current directory."""
    if isinstance(space, Range):
        return text, space
    values = tuple(with_absolute_files(space.key, value, config) for value in space.values)
    if values == space.values:
        return text, space
    return f"{space.key}={','.join(map(toml_text, values))}", Choices(space.key, values)


def _check_once(keys: Sequence[str], differing: set[str]) -> None:
    """Raises UserError if a key is given twice, or if one of two overlapping keys differs between trials: the later one
    would override the other."""
    if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise UserError(f"{twice[0]} is given {keys.count(twice[0])} times; give all of its values once")
    for section, key in itertools.permutations(keys, 2):
        if key.startswith(f"{section}.") and not differing.isdisjoint((section, key)):
            raise UserError(f"{section} has {key} in it, so one would override the other; give only one of them")


def _check_different(drawn: Sequence[dict[str, Any]], configs: Sequence[Config]) -> None:
    """Raises UserError if two trials have the same config: values that differ as text may be equal, as 1 and 1.0."""
    first: dict[str, int] = {}
    for number, cfg in enumerate(configs, 1):
        if (other := first.setdefault(cfg.model_dump_json(), number)) != number:
            same = [" ".join(as_overrides(drawn[one - 1])) for one in (other, number)]
            raise UserError(
                f"trials {other} and {number} would have the same config ({same[0]}; {same[1]}); name every value once"
            )


def _checked(config: Path, fixed: Sequence[str], settings: dict[str, Any], number: int, trials: int) -> Config:
    try:
        return load_config(config, [*fixed, *as_overrides(settings)], Config)
    except UserError as error:
        raise UserError(
            f"trial {number} of {trials} ({' '.join(as_overrides(settings))}) would not start, so none does: {error}"
        ) from None


def _first_rung(configs: Sequence[Config], every: int) -> int:
    """The step of the first evaluation after all warm-ups. Before it, tuned settings have not had their full effect."""
    warmup = max(max(cfg.critic_warmup_steps, cfg.optimizer.warmup_steps) for cfg in configs)
    return every * (warmup // every + 1)
