"""The command line: `ratchet train`, `ratchet config`. Bad input ends in one message and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import fill, indent
from typing import Annotated

import typer

from common.config import Config, UserError, describe, load_config


def _settings() -> str:
    """Every setting with its meaning, as `ratchet config --describe` prints it."""
    return "\n".join(
        f"{key} ({kind}; default {default})\n" + fill(meaning, 100, initial_indent="    ", subsequent_indent="    ")
        for key, kind, default, meaning in describe()
    )


# What a run may change when it goes on: nothing that decides what is learned from the journal. The learner's own way
# of computing it may change, to get past a crash; replayed steps then agree to rounding, not to the bit.
_RESUMABLE = (
    "num_steps",
    "learner.micro_batch_tokens",
    "learner.gradient_checkpointing",
    "learner.threads",
    "learner.timeout_s",
    "generators.",
    "reference.",
    "reward.replicas",
    "reward.timeout_s",
    "reward.max_void_share",
    "evaluation.",
    "checkpoint.",
    "ray.",
)

app = typer.Typer(
    help="PPO from human feedback on Ray and vLLM.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command(epilog="\b\nSettings, any of which may be given as key=value:\n" + indent(_settings(), "  "))
def train(
    config: Annotated[str, typer.Argument(help="A TOML file; with --resume: a first key=value setting.")] = "",
    settings: Annotated[list[str] | None, typer.Argument(help="key=value settings over the file's.")] = None,
    run: Annotated[Path | None, typer.Option(help="Run directory [default: runs/NAME-OF-CONFIG].")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run directory.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run directory if it exists.")] = False,
) -> None:
    """Train a policy with PPO."""
    overrides = list(settings or [])
    if resume is not None:
        if run is not None or config.endswith(".toml"):
            raise UserError("--resume goes on with the config of its run directory; give no config file and no --run")
        overrides = [config, *overrides] if config else overrides
        cfg, directory = _resumed(resume, overrides), resume
    elif config:
        cfg, directory = load_config(Path(config), overrides), run or Path("runs") / Path(config).stem
    else:
        raise UserError("name a config file, such as deploy/configs/larger.toml, or a run directory with --resume")
    sys.path.append(str(Path.cwd()))  # reward functions and prompts may lie beside the user
    from deploy.train import run_training  # slow to import: torch, transformers, Ray

    try:
        run_training(cfg, directory, resume=resume is not None, force=force)
    except KeyboardInterrupt:
        typer.echo(f"ratchet: interrupted; go on with ratchet train --resume {directory}", err=True)
        sys.exit(130)


@app.command()
def config(
    config: Annotated[Path | None, typer.Argument(help="A TOML file to resolve and print.")] = None,
    settings: Annotated[list[str] | None, typer.Argument(help="key=value settings over the file's.")] = None,
    explain: Annotated[bool, typer.Option("--describe", help="Explain every setting.")] = False,
) -> None:
    """Show a resolved config, or explain every setting."""
    if explain:
        typer.echo(_settings())
    elif config is not None:
        typer.echo(load_config(config, settings or []).to_toml())
    else:
        raise UserError("name a config file to resolve, or ask for --describe")


def _resumed(directory: Path, overrides: list[str]) -> Config:
    if not (directory / "config.toml").exists():
        raise UserError(f"{directory} is no run directory (no config.toml); name one that ratchet train has made")
    if fixed := [text for text in overrides if not text.startswith(_RESUMABLE)]:
        raise UserError(
            f"{', '.join(fixed)} cannot change when a run goes on, since its journal was written under the old value; "
            f"changeable: {', '.join(name.rstrip('.') for name in _RESUMABLE)}; or start a new run"
        )
    before, after = load_config(directory / "config.toml"), load_config(directory / "config.toml", overrides)
    if after.num_steps != before.num_steps and after.optimizer.schedule != "constant":
        raise UserError(
            f"num_steps={after.num_steps} cannot change when a run goes on: the {after.optimizer.schedule} schedule "
            f"was laid out for {before.num_steps} steps; start a new run"
        )
    return after


def main() -> None:
    try:
        app(standalone_mode=True)
    except UserError as error:
        typer.echo(f"ratchet: {error}", err=True)
        sys.exit(2)
