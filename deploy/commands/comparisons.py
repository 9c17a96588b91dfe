"""Commands that compare: policies on held-out prompts, and settings in many runs.

Runs in the driver. Each command imports its work when it is called: torch, transformers and Ray are slow to import.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from deploy.command_line import (
    Address,
    Force,
    Resume,
    Settings,
    config_and_directory,
    epilog,
    find_modules_of,
    name_of_config,
    run_directory,
    with_address,
)
from deploy.ending import exit_message
from deploy.evaluation.names import policy_names
from deploy.shipped import config_file

app = typer.Typer()


@app.command(epilog=epilog("train"))
def evaluate(
    config: Annotated[str, typer.Argument(help="A PPO config, such as RUN/config.toml.", callback=config_file)] = "",
    settings: Settings = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="A policy to compare; may be given several times."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Answers to each prompt [default: 1].")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run directory [default: runs/NAME-evaluation].")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the evaluation in this directory.")] = None,
    address: Address = None,
    force: Force = False,
    variance: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Instead: measure the noise of this run's gradients."),
    ] = None,
    after: Annotated[int | None, typer.Option(min=0, metavar="N", help="With --variance: steps learned.")] = None,
    steps: Annotated[str | None, typer.Option(metavar="A:B", help="With --variance: batches A to B - 1.")] = None,
    model: Annotated[str | None, typer.Option(hidden=True)] = None,  # as for replay; docs/evaluation.md has them
    critic: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare policies on held-out prompts, or measure the gradients of a run."""
    of_variance: dict[str, Any] = {"after": after, "steps": steps, "model": model, "critic": critic}
    if variance is not None:
        if policy or samples or run or resume or force or address or config.endswith(".toml"):
            raise UserError(
                "--variance reads the directory of a run: with it give only --after, --steps, --model, --critic, and "
                "settings of the layout of devices"
            )
        from deploy.variance.command import run_variance

        run_variance(variance, **of_variance, settings=[*filter(None, [config]), *(settings or [])])
        return
    if alone := [f"--{name}" for name, value in of_variance.items() if value is not None]:
        raise UserError(f"{', '.join(alone)} must be given with --variance RUN; add it, or leave them out")
    given, policies = with_address(settings, address), policy_names(policy or [])
    if resume is not None:
        cfg, directory = config_and_directory(Config, config, given, run, resume)
    elif not config:
        raise UserError("name the config file of a PPO run, such as RUN/config.toml, or an evaluation with --resume")
    else:
        path = Path(config)
        cfg = load_config(path, given, Config)
        directory = find_modules_of(path, run or Path("runs") / f"{name_of_config(path)}-evaluation")
    exit_message.run_begins(directory, f"continue with ratchet evaluate --resume {quote(str(directory))}")
    from deploy.evaluation.command import run_evaluation

    run_evaluation(cfg, directory, policies=policies, samples=samples, resume=resume is not None, force=force)


@app.command(epilog=epilog("train"))
def tune(
    config: Annotated[
        str, typer.Argument(help="A TOML file or shipped config; not with --resume.", callback=config_file)
    ] = "",
    spaces: Annotated[
        list[str] | None,
        typer.Argument(help="Values to try: KEY=a,b,c, KEY=lo..hi, KEY=log:lo..hi."),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of trials. [default: 12]")] = None,
    hours: Annotated[
        float | None,
        typer.Option(min=0.001, max=1e5, metavar="H", help="Limit for all starts together. [default: 1]"),
    ] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="score, pass_at_1, or a source or judge.")] = None,
    finalists: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Best trials, which get more seeds. [default: 2]")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Seeds of each finalist. [default: 3]")] = None,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="ASHA stops no trial.")] = False,
    at_once: Annotated[int, typer.Option(min=1, metavar="N", help="Runs at the same time.")] = 1,
    run: Annotated[Path | None, typer.Option(help="Run directory [default: runs/NAME-tune].")] = None,
    resume: Resume = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster of the runs, as in ratchet train.")] = None,
    force: Force = False,
) -> None:
    """Try settings of a PPO config, find the best, and see which of them matter."""
    from deploy.tune.command import Pace, run_tune
    from deploy.tune.plan import make_plan

    pace, new = Pace(hours, at_once), None
    if resume is None:
        directory = run_directory(config, run or Path("runs") / f"{name_of_config(Path(config))}-tune", None)
        new = make_plan(
            Path(config),
            with_address(spaces, address),
            trials=trials or 12,
            metric=metric,
            finalists=finalists or 2,
            seeds=seeds or 3,
            keep_all=keep_all,
        )
        directory = find_modules_of(Path(config), directory)
    elif config or any((run, address, metric, trials, finalists, seeds, keep_all)):
        raise UserError("a tuning that continues (--resume) has its plan; give only --hours and --at-once with it")
    else:
        directory = find_modules_of(resume / "config.toml", resume)
    exit_message.run_begins(directory, f"continue with ratchet tune --resume {quote(str(directory))}")
    run_tune(directory, pace, new, force=force)
