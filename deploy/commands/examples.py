"""Commands that show what Ratchet has: a demo, shipped configs, every setting.

Runs in the driver. Each command imports its work when it is called: torch, transformers and Ray are slow to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from common.config.loading import load_config
from common.errors import UserError
from common.user_code.import_path import find_users_modules
from deploy.command_line import ROOTS, Address, Force, Preset, Settings, settings_text, with_address
from deploy.ending import exit_message
from deploy.presets import with_preset
from deploy.shipped import config_file, listing, shipped_text

app = typer.Typer()


@app.command()
def demo(
    name: Annotated[Literal["rlhf"], typer.Argument(help="rlhf: pairs, reward model, PPO, verdict.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value settings for every stage that has them.")
    ] = None,
    run: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo-rlhf"),
    address: Address = None,
    force: Force = False,
) -> None:
    """Show human feedback from beginning to end, on two cores."""
    find_users_modules()
    from deploy.demo import run_rlhf_demo

    exit_message.run_begins(run, "begin again with --force")
    run_rlhf_demo(run, with_address(settings, address), force=force)


@app.command()
def config(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file or shipped config to resolve and print.", callback=config_file)
    ] = None,
    settings: Settings = None,
    preset: Preset = None,
    shipped: Annotated[bool, typer.Option("--list", help="List the shipped configs.")] = False,
    unchanged: Annotated[bool, typer.Option("--text", help="Print a shipped config with its comments.")] = False,
    command: Annotated[str, typer.Option("--for", help=f"The command that it is for: {', '.join(ROOTS)}.")] = "train",
    explain: Annotated[bool, typer.Option("--describe", help="Explain every setting.")] = False,
) -> None:
    """Show a resolved config, the shipped ones, or every setting."""
    if command not in ROOTS:
        raise UserError(f"--for ({command}) must be one of {', '.join(ROOTS)}")
    if explain:
        typer.echo(settings_text(command))
    elif shipped:
        typer.echo(listing())
    elif unchanged:
        if preset or settings or config is None:
            raise UserError("--text prints a shipped config unchanged: name one, and give no settings and no preset")
        typer.echo(shipped_text(config), nl=False)
    elif config is not None:
        path, root = config, ROOTS[command]
        typer.echo(with_preset(preset, settings or [], lambda given: load_config(path, given, root)).to_toml())
    else:
        raise UserError("name a config file to resolve, or ask for --list or --describe")
