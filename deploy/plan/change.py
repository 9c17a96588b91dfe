"""The smallest change of settings with which a run fits its machines. Runs in the driver; pure arithmetic.

`ratchet plan` shows the change, and the error message of a command ends with it. deploy/plan/ladders.py lists the
settings, the least harmful change first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, TypeVar

from common.config.base import Root
from common.config.overrides import as_overrides
from common.model.size import ModelSize
from deploy.plan.ladders import LADDERS, Given, Settings

AnyRoot = TypeVar("AnyRoot", bound=Root)


@dataclass(frozen=True)
class Change:
    """New values of the settings of one ladder, or of two."""

    settings: Settings
    effect: str  # what they cost

    def __str__(self) -> str:
        """The settings as the command line takes them, and what they cost."""
        return f"{' '.join(as_overrides(self.settings))} ({self.effect})"


def smallest_change(
    cfg: AnyRoot,
    fits: Callable[[AnyRoot], bool],
    model: ModelSize | None = None,
    may_change: Callable[[str], bool] = lambda key: True,
) -> Change | None:
    """The least harmful change of one setting with which the run `fits`; if there is none, of two settings. None if no
    such change fits. `model`: the model of the engines; without it the KV cache keeps its size. `may_change` says for a
    key whether its setting may change."""
    ladders = changes(cfg, model, may_change)
    for ladder in ladders:
        for change in ladder:
            if _fits_with(cfg, change, fits):
                return change
    return _smallest_pair(cfg, ladders, fits)


def changes(
    cfg: Root, model: ModelSize | None = None, may_change: Callable[[str], bool] = lambda key: True
) -> list[list[Change]]:
    """Every ladder that has a value for this config, in the order of harm."""
    ladders = [[Change(settings, effect) for settings in values(Given(cfg, model))] for effect, values in LADDERS]
    allowed = [[change for change in ladder if all(map(may_change, change.settings))] for ladder in ladders]
    return [ladder for ladder in allowed if ladder]


def changed(cfg: AnyRoot, settings: Settings) -> AnyRoot | None:
    """The config with these values; None if a rule refuses it."""
    tree = cfg.model_dump(exclude_none=True, mode="json")
    for key, value in settings.items():
        *sections, leaf = key.split(".")
        part: Any = tree
        for name in sections:
            part = part[int(name)] if isinstance(part, list) else part.setdefault(name, {})
        part[leaf] = value
    try:
        return type(cfg).model_validate(tree)
    except ValueError:
        return None


def _fits_with(cfg: AnyRoot, change: Change, fits: Callable[[AnyRoot], bool]) -> bool:
    found = changed(cfg, change.settings)
    return found is not None and fits(found)


def _smallest_pair(cfg: AnyRoot, ladders: Sequence[Sequence[Change]], fits: Callable[[AnyRoot], bool]) -> Change | None:
    """The first change of two settings that fits, in the order of the more harmful one. Each pair of ladders is first
    tried with its last values, because most do not fit even with those."""
    pairs = sorted(combinations(ladders, 2), key=lambda pair: (ladders.index(pair[1]), ladders.index(pair[0])))
    for one, other in pairs:
        tried = product(_ends(one), _ends(other))
        if any(_fits_with(cfg, _both(first, second), fits) for first, second in tried):
            every = (_both(first, second) for second, first in product(other, one))
            return next(both for both in every if _fits_with(cfg, both, fits))
    return None


def _ends(ladder: Sequence[Change]) -> Sequence[Change]:
    """The last value. For shares of a GPU all values, because a larger share for one process leaves less for the
    others."""
    shares = any(key.endswith(".gpus") for key in ladder[0].settings)
    return ladder if shares else ladder[-1:]


def _both(one: Change, other: Change) -> Change:
    effects = dict.fromkeys([one.effect, other.effect])
    return Change({**one.settings, **other.settings}, "; ".join(effects))
