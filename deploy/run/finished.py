"""Checks, before Ray starts, whether a run to continue is finished already. Changes nothing. Runs in the driver.

Each `finished_...` prints and returns the summary of a run that has nothing left to do, and returns None for others.
"""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

from common.config.loading import load_config
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.errors import UserError
from deploy.run.record import RECORD, read_record
from deploy.screen.console import Output
from learner.loop.checkpoints import Checkpoints
from learner.loop.journal import Journal


def finished_training(cfg: Config, directory: Path) -> dict[str, Any] | None:
    """Raises UserError if the run cannot be continued: if another command made it, if it has more steps than num_steps,
    or if files of its journal are missing."""
    if (command := read_record(directory).get("command", "train")) != "train":
        raise UserError(f"{directory} was made by ratchet {command}; continue it with that command")
    journal = Journal(directory / "journal")
    steps = journal.next_step
    newest = Checkpoints(directory / "checkpoints", every=1, keep=1).newest()
    saved = int(newest.name.removeprefix("step-")) if newest is not None else 0
    export = f"ratchet export {quote(str(directory))} writes the policy of its newest checkpoint"
    restore = "files of the journal are missing; restore them (is their storage mounted?) or start a new run"
    if saved > steps:
        raise UserError(
            f"{directory}/journal holds {steps} steps, but {newest} was written after {saved} steps: {restore}; "
            f"{export}"
        )
    if steps == 0 and (signs := _signs_of_steps(directory, has_begun=bool(journal.notes))):
        raise UserError(f"{directory}/journal holds no step, but the run has done some ({signs[0]}): {restore}")
    if steps > cfg.num_steps:
        raise UserError(
            f"num_steps ({cfg.num_steps}) is fewer than the {steps} steps that {directory} has done; raise it to "
            f"continue; {export}"
        )
    if steps < cfg.num_steps or not (directory / "policy/config.json").exists():
        return None
    more = f"raise num_steps to continue; {export if saved else ''}".rstrip("; ")
    if cfg.optimizer.schedule != "constant":
        more = f"its {cfg.optimizer.schedule} schedule ends here, so for more steps start a new run"
    return _finished(directory, f"all {steps} steps are done; {more}")


def finished_reward_training(cfg: RewardTrainingConfig, directory: Path) -> dict[str, Any] | None:
    if cfg != load_config(directory / "config.toml", [], RewardTrainingConfig):
        return None  # for example, the scale of scores is measured again
    return _finished(directory, f"all {cfg.epochs} epochs are done; raise epochs to continue")


def finished_critic_training(cfg: Config, directory: Path) -> dict[str, Any] | None:
    """Raises UserError if another command made the run."""
    if (command := read_record(directory).get("command", "train")) != "train-critic":
        raise UserError(f"{directory} was made by ratchet {command}; continue it with that command")
    if cfg != load_config(directory / "config.toml", [], Config):
        return None  # for example, more passes
    more = "raise critic_training.passes to continue"
    if (_summary(directory) or {}).get("passes", 0) < cfg.critic_training.passes:
        more = "raise critic_training.patience to continue"
    elif cfg.optimizer.schedule != "constant":
        more = f"its {cfg.optimizer.schedule} schedule ends here, so for more passes start a new run"
    return _finished(directory, f"its critic is in {directory / 'critic'}; {more}")


def finished_pair_sampling(cfg: PairSamplingConfig, directory: Path) -> dict[str, Any] | None:
    if (_summary(directory) or {"voids": 1}).get("voids"):
        return None  # void pairs are tried again
    return _finished(directory, f"every pair is labelled, in {directory / 'pairs.jsonl'}")


def _signs_of_steps(directory: Path, *, has_begun: bool) -> list[str]:
    """The files in the directory that only a run with steps in its journal has. `has_begun`: the journal has its first
    note."""
    # The first evaluation is written before step 0, so once a run has begun, it does not show that a step was done.
    signs = ["metrics.jsonl"] if has_begun else ["metrics.jsonl", "evaluations.jsonl"]
    found = [name for name in signs if (directory / name).exists()]
    return found if has_begun or "journal" not in read_record(directory) else [*found, RECORD]


def _finished(directory: Path, message: str) -> dict[str, Any] | None:
    """Prints the message and returns the summary; None without one, since a run writes it last."""
    if (summary := _summary(directory)) is not None:
        Output().print(f"{directory} is finished: {message}", markup=False, soft_wrap=True)
    return summary


def _summary(directory: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None
