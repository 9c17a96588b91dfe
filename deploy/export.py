"""`ratchet export`: the policy of a run's newest checkpoint as a Hugging Face directory, without Ray.

Runs in a process of its own. The run may continue meanwhile: only the target directory is written.
"""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote

from torch.distributed.checkpoint.api import CheckpointException
from transformers.utils import logging as transformers_logging

from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from deploy.run.record import read_record
from deploy.screen.console import Output
from learner.loop.checkpoints import Checkpoints
from learner.ppo.learner import Learner


def run_export(run: Path, to: Path | None = None) -> Path:
    """Writes the policy into `to`, or into a directory of RUN/exported named after the step. Returns that directory.
    With LoRA, its subdirectory `adapter` has the adapters. Raises UserError."""
    if not os.path.exists(run / "config.toml"):
        raise UserError(f"{run} is no run directory (no config.toml); name one that ratchet train has made")
    if (command := read_record(run).get("command", "train")) != "train":
        raise UserError(f"{run} was made by ratchet {command}; export is for the policies of ratchet train")
    if to is not None and os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"--to ({to}) exists; name a new directory")
    cfg = load_config(run / "config.toml", [], Config)
    checkpoint = Checkpoints(run / "checkpoints", every=1, keep=1).newest()
    if checkpoint is None:
        raise UserError(
            f"{run} has no complete checkpoint: one is written every {cfg.checkpoint.every} steps (checkpoint.every); "
            f"continue the run with ratchet train --resume {quote(str(run))}"
        )
    transformers_logging.disable_progress_bar()
    # One process on the CPU reads the checkpoint of any number of ranks on any devices.
    alone = cfg.learner.model_copy(update={"ranks": 1, "gpus": 0, "gradient_checkpointing": False})
    learner = Learner(cfg.model_copy(update={"learner": alone}))
    try:
        step = learner.restore_policy(checkpoint)
    except (Exception, CheckpointException) as error:  # the second one is not an Exception
        reason = str(error).strip().rpartition("\n")[2]
        raise UserError(
            f"{checkpoint} cannot be read ({reason}); if the run is still active, it may have removed that checkpoint "
            "for a newer one: try again; otherwise remove it, and the earlier one is exported"
        ) from error
    target = to or run / "exported" / checkpoint.name
    learner.save_policy(target, adapter=target / "adapter")
    Output().print(
        f"policy after {step} of {cfg.num_steps} steps: {target} (transformers and vLLM can load it)",
        markup=False,
        soft_wrap=True,
    )
    return target
