"""Checks that a critic can be trained on its data, with steps left after the warm-up. Runs in the driver.

`check_data` checks the rollouts. `check_plan` runs before a sampling, because otherwise `check_data` might refuse all
that was sampled.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from common.config.ppo import Config
from common.errors import UserError
from common.memory import GIB
from common.model.size import ModelSize
from deploy.screen.console import complain
from learner.critic.rollouts import Rollouts, num_heldout
from learner.critic.training import CriticData

STATE_BYTES = 4  # most bytes of one number of the trunk's hidden states


def check_data(data: CriticData, directory: Path, size: ModelSize) -> None:
    """Raises UserError if a training on this data could not succeed."""
    data.check_returns()
    _check_warmup(data.cfg, data.num_steps, len(data.rows))
    if lack := _lack_of_room(data.cfg, directory, size, int(data.rollouts.response_tokens.sum())):
        raise UserError(f"{lack}; choose another --run, or fewer --steps")


def check_plan(
    cfg: Config, directory: Path, size: ModelSize, num_prompts: int, responses: int, others: Rollouts
) -> None:
    """Raises UserError if a training could not succeed on this many responses to the training prompts together with the
    rollouts of `others`. Only warns if the disk has no room for the longest possible responses."""
    asked = min(num_prompts, -(-responses // cfg.prompts.rollouts_per_prompt))
    if asked < 2 and not len(others):
        raise UserError(
            f"--sample ({responses}) asks a single prompt, and the critic is judged on prompts that it has not learned "
            "from; ask for more responses, or give more prompts (prompts.train)"
        )
    rollouts, prompts = responses + len(others), asked + others.num_prompts  # prompts in both are counted twice
    learned = rollouts - round(rollouts * num_heldout(prompts, cfg.critic_training.heldout_share) / prompts)
    _check_warmup(cfg, cfg.critic_training.passes * -(-learned // cfg.rollouts_per_step), learned)
    tokens = responses * cfg.max_response_tokens + int(others.response_tokens.sum())
    if lack := _lack_of_room(cfg, directory, size, tokens):
        complain(f"warning: {lack}; if responses are shorter, they fit")


def _check_warmup(cfg: Config, num_steps: int, rollouts: int) -> None:
    warmup = cfg.optimizer.warmup_steps
    if warmup >= num_steps:
        raise UserError(
            f"optimizer.warmup_steps ({warmup}) must be below the {num_steps} steps of critic_training.passes "
            f"passes over {rollouts} rollouts; lower the first, or raise the passes"
        )


def _lack_of_room(cfg: Config, directory: Path, size: ModelSize, tokens: int) -> str | None:
    """One sentence if the states of a shared trunk for this many response tokens may not fit on the disk."""
    if cfg.learner.critic != "shared":
        return None
    needed = tokens * size.hidden * STATE_BYTES
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if needed <= (free := shutil.disk_usage(existing).free):
        return None
    return (
        f"the states of the shared trunk may take {needed / GIB:.1f} GiB, and {existing} has {free / GIB:.1f} GiB free"
    )
