"""Continuing a run: its config, which settings may change, and the directory it is continued from.

Runs in the driver, before anything slow is imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from common.config.base import Root
from common.config.loading import AnyRoot, load_config
from common.config.ppo import AdamWConfig, Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.errors import UserError
from deploy.run.provenance import IN_A_JOB
from deploy.run.record import read_record

# What a run may change when it continues: nothing that decides what is learned. The learner's own way of computing it
# may change, to get past a crash; repeated steps then agree to rounding, not to the bit.
_COMPUTING = (
    "learner.ranks",
    "learner.cpus",
    "learner.gpus",
    "learner.micro_batch_tokens",
    "learner.gradient_checkpointing",
    "learner.threads",
    "learner.cores",
    "learner.timeout_s",
    "checkpoint.",
    "ray.",
)
_REPLICATED = ("min", "max", "cores", "in_flight", "timeout_s", "probe_timeout_s", "drain_s", "max_shortage_s")
# How functions are called, not what they return: a run that stopped over one that hangs can be continued with others.
_SCORING = ("max_void_share", "isolation", "workers", "call_timeout_s")
_RESUMABLE: dict[type[Root], tuple[str, ...]] = {
    Config: (
        "num_steps",
        *_COMPUTING,
        "generators.",
        "reference.",
        *(f"reward.{key}" for key in _REPLICATED),
        *(f"reward.{key}" for key in _SCORING),
        "ppo.max_mismatch_kl",
        "ppo.max_mismatch_steps",
        "evaluation.",
        "monitoring.",
    ),
    RewardTrainingConfig: (
        "epochs",
        *_COMPUTING,
        "generators.",
        "scale.",
        "sampling.",
    ),
    PairSamplingConfig: ("generators.", *(f"labeller.{key}" for key in (*_REPLICATED, *_SCORING)), "ray."),
}


def resumed_config(root: type[AnyRoot], directory: Path, overrides: Sequence[str], *, travels: bool) -> AnyRoot:
    """The config of the run in `directory` with the settings that change. Raises UserError."""
    if not os.path.exists(directory / "config.toml"):
        raise UserError(f"{directory} is no run directory (no config.toml); name one that ratchet has made")
    changeable = _RESUMABLE[root]

    def may_change(override: str) -> bool:
        key = override.partition("=")[0].strip()
        return key in changeable or key.startswith(tuple(name for name in changeable if name.endswith(".")))

    if fixed := [text for text in overrides if not may_change(text)]:
        raise UserError(
            f"{', '.join(fixed)} cannot change when a run continues, since what it has done was done under the old "
            f"value; changeable: {', '.join(name.rstrip('.') for name in changeable)}; or start a new run"
        )
    before, after = (
        load_config(directory / "config.toml", given, root, keep_relative=travels) for given in ([], overrides)
    )
    optimizer: AdamWConfig | None = getattr(after, "optimizer", None)
    for key in ("num_steps", "epochs"):
        old, new = getattr(before, key, None), getattr(after, key, None)
        if old != new and optimizer is not None and optimizer.schedule != "constant":
            raise UserError(
                f"{key}={new} cannot change when a run continues: the {optimizer.schedule} schedule was laid out for "
                f"{old}; start a new run"
            )
    return after


def enter_starting_directory(run: Path) -> tuple[Path, list[Path]]:
    """Changes to the directory that the run was started from, where its reward functions and what they open were found.
    Returns the run directory as it is called from there, and where else its modules are.

    Stays here if that directory is gone, and in a job, which has a current directory of its own.
    """
    record = read_record(run)
    started = str(record.get("directory") or os.curdir)
    if IN_A_JOB not in os.environ and os.path.isdir(started) and not os.path.samefile(started, os.curdir):
        run = run.absolute()
        os.chdir(started)
    modules = record.get("import_from")
    return run, [Path(name) for name in modules if isinstance(name, str)] if isinstance(modules, list) else []
