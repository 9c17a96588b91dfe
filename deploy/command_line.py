"""Options that the commands share, and the reading of the config and the run directory that they name.

Runs in the driver, before anything slow is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from textwrap import fill
from typing import Annotated

import typer

from common.config.base import MAY_CHANGE, RECORDED, Root
from common.config.description import Setting, describe
from common.config.loading import AnyRoot, load_config
from common.config.ppo import Config
from common.errors import UserError
from common.user_code.import_path import find_users_modules
from deploy.ending import exit_message
from deploy.run.provenance import IN_A_JOB
from deploy.run.record import read_record
from deploy.run.resume import enter_starting_directory, resumed_config
from deploy.shipped import config_file

ROOTS: dict[str, type[Root]] = {}  # the kind of config of each command that has run directories

ConfigFile = Annotated[
    str, typer.Argument(help="TOML file or shipped config; --resume: a setting.", callback=config_file)
]
Settings = Annotated[list[str] | None, typer.Argument(help="key=value settings that override the file's.")]
RunOption = Annotated[Path | None, typer.Option(help="Run directory [default: runs/NAME-OF-CONFIG].")]
Resume = Annotated[Path | None, typer.Option(help="Continue the run in this directory.")]
Force = Annotated[bool, typer.Option("--force", help="Begin a new run; rename an old one to RUN.old-1.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of a running Ray cluster; auto: the only one on this machine; local: start one for this "
        "command. Overrides ray.address, which overrides the variable RAY_ADDRESS. [default: local]"
    ),
]
Restarts = Annotated[int, typer.Option(min=0, metavar="N", help="After a failure, continue the run: N times at most.")]
Preset = Annotated[str | None, typer.Option(metavar="NAME", help="careful, balanced, fast, or a file of settings.")]
Change = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="With --resume: change a setting, and record it.")
]
Accept = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="With --resume: accept another model or prompts.")
]


def epilog(command: str) -> str:
    option = "" if command == "train" else f" --for {command}"
    return f"Every setting is explained by: ratchet config --describe{option}"


Work = Callable[..., None]  # (config, run directory, resume=, force=)


def run_command(app: typer.Typer, root: type[Root]) -> Callable[[Work], Work]:
    """Registers the decorated function as a command of `app` with the options that every run has. The function gets the
    run directory, and the config of the new run or of the run to continue."""

    def register(work: Work) -> Work:
        name = work.__name__.replace("_", "-")
        ROOTS[name] = root

        @app.command(name, help=work.__doc__, epilog=epilog(name))
        def command(
            config: ConfigFile = "",
            settings: Settings = None,
            run: RunOption = None,
            resume: Resume = None,
            address: Address = None,
            force: Force = False,
        ) -> None:
            cfg, directory = config_and_directory(root, config, with_address(settings, address), run, resume)
            exit_message.run_begins(directory, f"continue with ratchet {name} --resume {quote(str(directory))}")
            work(cfg, directory, resume=resume is not None, force=force)

        return work

    return register


def run_directory(config: str, run: Path | None, resume: Path | None) -> Path:
    """The directory of a new run, or of the run to continue."""
    if resume is not None:
        return resume
    if not config:
        raise UserError("name a config file or a shipped one (ratchet config --list), or a run directory with --resume")
    return run or Path("runs") / Path(config).stem


def name_of_config(config: Path) -> str:
    """The name for another run with this config: the name of the file or, for RUN/config.toml, the name of RUN."""
    return config.resolve().parent.name if config.name == "config.toml" else config.stem


def refuse_wrong_options(
    resume: Path | None, preset: str | None, changes: Sequence[str] | None, accepted: Sequence[str] | None
) -> None:
    """Raises UserError if options for a run that continues are given to a new one, or the other way round."""
    if resume is not None and preset:
        raise UserError(f"--preset {preset} is for a new run; the settings of this one are in {resume / 'config.toml'}")
    if resume is None and changes:
        raise UserError(f"--change {changes[0]} is for a run that continues (--resume); give {changes[0]} as a setting")
    if resume is None and accepted:
        raise UserError(f"--accept {accepted[0]} is for a run that continues (--resume); leave it out")


def config_and_directory(
    root: type[AnyRoot],
    config: str,
    settings: Sequence[str],
    run: Path | None,
    resume: Path | None,
    changes: Sequence[str] | None = None,
) -> tuple[AnyRoot, Path]:
    """The config and the run directory of a new run, or of the run to continue. `changes`: the values of --change; None
    if the command has no such option. Afterwards the user's modules can be imported. If the run continues RUN, or its
    config is in RUN, the current directory becomes the one that RUN was started from."""
    in_a_job = IN_A_JOB in os.environ  # file names stay relative, because each job has its own current directory
    if resume is not None:
        cfg = resumed_config(root, resume, _settings_of_resume(config, settings, run), changes, travels=in_a_job)
        directory, modules = enter_starting_directory(resume)
        find_users_modules(*modules)
        return cfg, directory
    directory = run_directory(config, run, resume)
    cfg = load_config(Path(config), settings, root, keep_relative=in_a_job)
    return cfg, find_modules_of(Path(config), directory)


def find_modules_of(config: Path, directory: Path) -> Path:
    """Makes the modules that a config names importable. For a config in a run directory RUN, such as RUN/config.toml,
    the current directory becomes the one that RUN was started from. Returns `directory`, the directory of a new run, as
    a path that is still right then."""
    if not read_record(config.parent):
        find_users_modules(config.absolute().parent)
        return directory
    directory = directory.absolute()
    find_users_modules(*enter_starting_directory(config.parent)[1])
    return directory


def config_of_a_job(
    config: str, settings: Sequence[str], run: Path | None, resume: Path | None, changes: Sequence[str] = ()
) -> tuple[Config, Sequence[Path]]:
    """The config of a job, with relative file names: the job's current directory is a copy of this one. Also returns
    the directory of the config file, as a relative path to import modules from, if it is in the current directory."""
    modules = [Path(config).absolute().parent] if resume is None else []
    here = [Path(os.path.relpath(directory)) for directory in modules if directory.is_relative_to(Path.cwd())]
    find_users_modules(*here)
    if resume is not None:
        return resumed_config(Config, resume, _settings_of_resume(config, settings, run), changes, travels=True), here
    return load_config(Path(config), settings, Config, keep_relative=True), here


def _settings_of_resume(config: str, settings: Sequence[str], run: Path | None) -> Sequence[str]:
    """The settings given with --resume. The command line gives the first one as `config`."""
    if run is not None or config.endswith(".toml"):
        raise UserError("--resume continues with the config of its run directory; give no config file and no --run")
    return [config, *settings] if config else settings


def with_address(settings: Sequence[str] | None, address: str | None) -> list[str]:
    """The settings, then --address as the setting ray.address, which overrides earlier ones."""
    return [*(settings or []), *([f"ray.address={json.dumps(address)}"] if address else [])]


def settings_text(command: str) -> str:
    """Every setting of a command with its meaning, for `ratchet config --describe`. Only `ratchet train` has --change,
    so for other commands nothing is said about settings that it changes."""
    return "\n".join(
        f"{s.key} ({s.kind}; default {s.default}{f'; {s.change}' if _can_change(s, command) else ''})\n"
        + fill(s.meaning, 100, initial_indent="    ", subsequent_indent="    ")
        for s in describe(ROOTS[command])
    )


def _can_change(setting: Setting, command: str) -> bool:
    return setting.change == MAY_CHANGE or (setting.change == RECORDED and command == "train")
