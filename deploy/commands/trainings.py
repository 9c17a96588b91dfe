"""Commands for what a PPO run starts from: preference pairs, reward models, critics.

Runs in the driver. Each command imports its work when it is called: torch, transformers and Ray are slow to import.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.errors import UserError
from deploy.command_line import (
    ROOTS,
    Address,
    ConfigFile,
    Force,
    Resume,
    Settings,
    config_and_directory,
    epilog,
    name_of_config,
    run_command,
    with_address,
)
from deploy.ending import exit_message

app = typer.Typer()
ROOTS["train-critic"] = Config


@run_command(app, RewardTrainingConfig)
def train_reward(cfg: RewardTrainingConfig, directory: Path, *, resume: bool, force: bool) -> None:
    """Train a reward model from preference pairs."""
    from deploy.train_reward import run_reward_training

    run_reward_training(cfg, directory, resume=resume, force=force)


@app.command(epilog=epilog("train-critic"))
def train_critic(
    config: ConfigFile = "",
    settings: Settings = None,
    source: Annotated[
        list[Path] | None,
        typer.Option(
            "--from", metavar="RUN", help="A run whose journal the critic learns from; may be given several times."
        ),
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="A:B", help="Only steps A to B - 1 of each journal [default: all].")
    ] = None,
    sample: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="First sample N responses of the starting policy to training prompts."),
    ] = 0,
    run: Annotated[Path | None, typer.Option(help="Run directory [default: runs/NAME-critic].")] = None,
    resume: Resume = None,
    address: Address = None,
    force: Force = False,
) -> None:
    """Train a critic from the journals of runs, for a run to start from."""
    if resume is not None and (source or steps or sample):
        raise UserError("a training that continues (--resume) knows its data; leave --from, --steps and --sample out")
    if resume is None and config and run is None:
        run = Path("runs") / f"{name_of_config(Path(config))}-critic"
    here = Path.cwd()
    cfg, directory = config_and_directory(Config, config, with_address(settings, address), run, resume)
    exit_message.run_begins(directory, f"continue with ratchet train-critic --resume {quote(str(directory))}")
    from deploy.train_critic import run_critic_training

    resumed, moved = resume is not None, Path.cwd() != here
    sources = [here / path if moved else path for path in source or []]
    run_critic_training(cfg, directory, sources=sources, steps=steps, sample=sample, resume=resumed, force=force)


@run_command(app, PairSamplingConfig)
def sample_pairs(cfg: PairSamplingConfig, directory: Path, *, resume: bool, force: bool) -> None:
    """Sample pairs of responses that a labeller compares."""
    from deploy.sample_pairs import run_pair_sampling

    run_pair_sampling(cfg, directory, resume=resume, force=force)
