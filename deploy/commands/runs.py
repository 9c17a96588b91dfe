"""Commands for PPO runs: plan one, train, train as a job of a cluster.

Runs in the driver. Each command imports its work when it is called: torch, transformers and Ray are slow to import.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from common.config.loading import given_settings, load_config
from common.config.ppo import Config
from common.errors import UserError
from deploy.command_line import (
    ROOTS,
    Accept,
    Address,
    Change,
    ConfigFile,
    Force,
    Preset,
    Restarts,
    Resume,
    RunOption,
    Settings,
    config_and_directory,
    config_of_a_job,
    epilog,
    find_modules_of,
    refuse_wrong_options,
    run_directory,
    with_address,
)
from deploy.ending import exit_message
from deploy.presets import with_preset
from deploy.shipped import config_file

app = typer.Typer()
ROOTS["train"] = Config


@app.command(epilog=epilog("train"))
def train(
    config: ConfigFile = "",
    settings: Settings = None,
    run: RunOption = None,
    resume: Resume = None,
    preset: Preset = None,
    restarts: Restarts = 0,
    change: Change = None,
    accept: Accept = None,
    address: Address = None,
    force: Force = False,
) -> None:
    """Train a policy with PPO."""
    if restarts:
        from deploy.restarts import Supervisor, without_restarts

        directory = run_directory(config, run, resume)
        arguments = without_restarts(sys.argv[1:])
        sys.exit(Supervisor(arguments, directory, resume=resume is not None, restarts=restarts).run())
    refuse_wrong_options(resume, preset, change, accept)
    given = with_address(settings, address)
    load = partial(config_and_directory, Config, config, run=run, resume=resume, changes=change or [])
    cfg, directory = with_preset(preset, given, load)
    exit_message.run_begins(directory, f"continue with ratchet train --resume {quote(str(directory))}")
    from deploy.train import run_training

    changed = [setting.partition("=")[0].strip() for setting in change or []]
    run_training(cfg, directory, resume=resume is not None, force=force, changed=changed, accepted=accept or [])


@app.command(epilog=epilog("train"))
def plan(
    config: Annotated[str, typer.Argument(help="A TOML file or shipped config.", callback=config_file)],
    settings: Settings = None,
    preset: Preset = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, max=1000, metavar="N", help="Nodes of the machines to plan for.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, max=64, metavar="N", help="GPUs of each node.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=1, max=1e5, metavar="GIB", help="Memory of each GPU.")] = None,
    cpus: Annotated[float | None, typer.Option(min=1, max=1e5, metavar="N", help="CPU cores of each node.")] = None,
    memory: Annotated[float | None, typer.Option(min=1, max=1e6, metavar="GIB", help="Memory of each node.")] = None,
    address: Address = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="Measured rates for seconds: h100, zen5-core, or a file. Repeatable."),
    ] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option(min=1, metavar="N", help="Tokens of a typical prompt. Left out: the longest.")
    ] = None,
    response_tokens: Annotated[
        float | None, typer.Option(min=1, metavar="N", help="Tokens of a typical response. Left out: the longest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    suggest: Annotated[
        bool,
        typer.Option("--suggest", help="Print a config that fits; max_staleness and learner.lora may change, too."),
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="With --suggest: write it to this new file.")] = None,
) -> None:
    """Show who would run where and what it takes. Exit code 0: it fits; 1: it does not; 2: wrong input."""
    if (suggest and as_json) or (out is not None and not suggest):
        raise UserError("--out goes with --suggest, and --json without it; leave one of them out")
    path = Path(config)
    given = with_address(settings, address)
    cfg = with_preset(preset, given, lambda settings: load_config(path, settings, Config))
    find_modules_of(path, path.parent)
    from deploy.plan.command import run_plan, run_suggest
    from deploy.plan.machines import Described
    from deploy.plan.step import Typical

    described = Described(nodes, gpus, gpu_memory, cpus, memory)
    if described and address is not None:
        raise UserError(
            "--address plans for a running cluster, and --nodes, --gpus, --gpu-memory, --cpus and --memory describe "
            "machines; give only one of them"
        )
    typical = Typical(rate or (), prompt_tokens, response_tokens)
    if not suggest:
        sys.exit(run_plan(cfg, described, typical=typical, as_json=as_json))
    tree = with_preset(preset, given, lambda settings: given_settings(path, settings))
    fixed = [setting.partition("=")[0] for setting in settings or []]
    title = f"ratchet {' '.join(' '.join(sys.argv[1:]).split())}"
    sys.exit(run_suggest(tree, described, title, fixed=fixed, out=out, typical=typical))


@app.command(epilog=epilog("train"))
def submit(
    config: ConfigFile = "",
    settings: Settings = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="The dashboard's URL, such as http://127.0.0.1:8265.",
            envvar="RAY_API_SERVER_ADDRESS",  # Ray's own variable
        ),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="New run directory, on storage that every node sees.")] = None,
    resume: Resume = None,
    preset: Preset = None,
    restarts: Restarts = 3,
    change: Change = None,
    accept: Accept = None,
    force: Force = False,
    follow: Annotated[bool, typer.Option(help="Print the job's log, and exit with its result.")] = True,
) -> None:
    """Train with PPO as a job of a Ray cluster. The current directory goes along."""
    if address is None:
        raise UserError("name the cluster's dashboard with --address, such as http://127.0.0.1:8265")
    if run is None and resume is None:
        raise UserError(
            "name the run directory with --run: it must be on storage that every node sees, because the job's own "
            "directory is deleted after the job; a relative path starts at the current directory"
        )
    refuse_wrong_options(resume, preset, change, accept)
    load = partial(config_of_a_job, config, run=run, resume=resume, changes=change or [])
    cfg, modules = with_preset(preset, settings or [], load)
    directory = Path(os.path.abspath(resume or run or ""))
    from deploy.run.directory import refuse_overwriting
    from deploy.submit import submit_run

    if resume is None:
        if os.path.lexists(directory):  # if not, perhaps only the cluster sees it
            refuse_overwriting(directory, force=force)
        arguments = ["--run", str(directory), *(["--force"] if force else [])]
    else:
        options = [f"--change={setting}" for setting in change or []] + [f"--accept={name}" for name in accept or []]
        arguments = [*filter(None, [config]), *(settings or []), "--resume", str(directory), *options]
    arguments += ["--restarts", str(restarts)]
    resumed = resume is not None
    sys.exit(submit_run(cfg, arguments, directory, resume=resumed, modules=modules, address=address, follow=follow))
