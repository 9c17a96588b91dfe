"""`ratchet export`: the policy of a checkpoint as a Hugging Face directory with a model card, without Ray.

Runs in a process of its own. The run may continue meanwhile: only the target directory is written.
"""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote

from transformers.utils import logging as transformers_logging

from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from common.files import read_records
from deploy.model_card import model_card
from deploy.run.record import read_record
from deploy.screen.bar import Bars
from deploy.screen.console import Output, complain
from learner.loop.checkpoints import CheckpointError, Checkpoints
from learner.ppo.learner import Learner


def run_export(run: Path, to: Path | None = None, step: int | None = None) -> Path:
    """Writes the policy after `step`, by default of the newest checkpoint, into `to`, or into a directory of
    RUN/exported named after the step. Returns that directory. With LoRA, its subdirectory `adapter` has the adapters.
    Raises UserError."""
    if not os.path.exists(run / "config.toml"):
        raise UserError(f"{run} is no run directory (no config.toml); name one that ratchet train has made")
    if (command := read_record(run).get("command", "train")) != "train":
        raise UserError(f"{run} was made by ratchet {command}; export is for the policies of ratchet train")
    if to is not None and os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"--to ({to}) exists; name a new directory")
    cfg = load_config(run / "config.toml", [], Config)
    checkpoints = Checkpoints(run / "checkpoints", every=1, keep=1)
    step = _checked(run, cfg, checkpoints, step)
    checkpoint = checkpoints.path(step)
    transformers_logging.disable_progress_bar()
    # One process on the CPU reads the checkpoint of any number of ranks on any devices.
    alone = cfg.learner.model_copy(
        update={"ranks": 1, "gpus": 0, "gradient_checkpointing": False, "compile": False, "critic_path": None}
    )
    with Bars(Output()) as bars:
        bars.show("export", 0, 3)
        learner = Learner(cfg.model_copy(update={"learner": alone}))
        bars.show("export", 1, 3)
        try:
            learner.restore_network(checkpoint)
        except (UserError, OSError) as error:
            raise UserError(f"{checkpoint} cannot be read ({error}){_PERHAPS_GONE}") from error
        bars.show("export", 2, 3)
        target = to or run / "exported" / checkpoint.name
        card = model_card(cfg, step, read_records(run / "evaluations.jsonl"), read_record(run))
        learner.save_policy(target, adapter=target / "adapter", card=card)
    Output().print(
        f"policy after {step} of {cfg.num_steps} steps: {target} (transformers and vLLM can load it)",
        markup=False,
        soft_wrap=True,
    )
    return target


_PERHAPS_GONE = "; if the run is still active, it may have removed that checkpoint for a newer one: try again"


def _checked(run: Path, cfg: Config, checkpoints: Checkpoints, step: int | None) -> int:
    """The step to export: `step`, or the newest one with an undamaged checkpoint. Raises UserError if there is
    none."""
    steps = checkpoints.steps()
    if not steps:
        raise UserError(
            f"{run} has no complete checkpoint: one is written every {cfg.checkpoint.every} steps (checkpoint.every); "
            f"continue the run with ratchet train --resume {quote(str(run))}"
        )
    if step is not None and step not in steps:
        raise UserError(f"--step ({step}) must be a step with a checkpoint in {run}: {', '.join(map(str, steps))}")
    faults: list[str] = []
    for candidate in reversed(steps) if step is None else [step]:
        try:
            checkpoints.check_files(candidate, optimizer=False)
            for fault in faults:
                complain(f"warning: {fault}; an earlier checkpoint is exported")
            return candidate
        except CheckpointError as error:
            faults.append(f"{checkpoints.path(candidate)} cannot be used: {error}")
    raise UserError(f"{'; '.join(faults)}{_PERHAPS_GONE}")
