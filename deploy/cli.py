"""The command line: `ratchet train`, `submit`, `export` and the others.

deploy/ending/ends.py says how a command ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from shlex import quote
from textwrap import fill
from typing import Annotated

import typer

from common.config.base import MAY_CHANGE, Root
from common.config.description import describe
from common.config.loading import AnyRoot, absolute_if_directory, load_config
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.errors import UserError
from common.user_code.import_path import find_users_modules
from deploy.ending import ends
from deploy.run.provenance import IN_A_JOB, ratchets_git_state, versions
from deploy.run.record import read_record
from deploy.run.resume import enter_starting_directory, resumed_config


def _settings(root: type[Root]) -> str:
    """Every setting with its meaning, as `ratchet config --describe` prints it."""
    return "\n".join(
        f"{s.key} ({s.kind}; default {s.default}{f'; {MAY_CHANGE}' if s.may_change else ''})\n"
        + fill(s.meaning, 100, initial_indent="    ", subsequent_indent="    ")
        for s in describe(root)
    )


_DASHBOARD = "RAY_API_SERVER_ADDRESS"  # Ray's own variable

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
ConfigFile = Annotated[str, typer.Argument(help="A TOML file; with --resume: a first key=value setting.")]
Settings = Annotated[list[str] | None, typer.Argument(help="key=value settings that override the file's.")]
RunOption = Annotated[Path | None, typer.Option(help="Run directory [default: runs/NAME-OF-CONFIG].")]
Resume = Annotated[Path | None, typer.Option(help="Continue the run in this directory.")]
Force = Annotated[
    bool, typer.Option("--force", help="Begin a new run where one exists, which is renamed to RUN.old-1.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of a running Ray cluster, auto, or local for one of its own. Overrides ray.address, which "
        "overrides the variable RAY_ADDRESS. [default: local]"
    ),
]
Work = Callable[..., None]  # (config, run directory, resume=, force=)


def _show_versions(show: bool) -> None:
    if not show:
        return
    found, git = versions(), ratchets_git_state()
    commit = f" (commit {git['commit'][:12]}{', changed' if git['dirty'] else ''})" if git else ""
    typer.echo(f"ratchet {found.pop('ratchet')}{commit}")
    typer.echo(", ".join(f"{name} {number}" for name, number in found.items()))
    raise typer.Exit


def _check_surroundings(arguments: Sequence[str]) -> None:
    """Python turns what is not valid UTF-8 into characters that nothing can write, and names of files are made absolute
    with the current directory. Raises UserError."""
    try:
        here = os.getcwd()
    except OSError:
        raise UserError("the current directory does not exist any more; change to another") from None
    try:
        here.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the current directory ({here!r}) is not valid UTF-8; rename it, or change to another"
        ) from None
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{argument!r} on the command line is not valid UTF-8; rename the file, or type it in a UTF-8 terminal"
            ) from None


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show versions and exit.", callback=_show_versions, is_eager=True)
    ] = False,
) -> None:
    """PPO from human feedback on Ray and vLLM."""
    _check_surroundings(sys.argv[1:])


def _epilog(kind: str) -> str:
    option = "" if kind == "train" else f" --for {kind}"
    return f"Every setting is explained by: ratchet config --describe{option}"


def _in_run_directory(root: type[Root]) -> Callable[[Work], Work]:
    """The decorated function as a command with the options that every run has: it works with the config that was named,
    or that of the run that goes on, and in its run directory."""

    def register(work: Work) -> Work:
        name = work.__name__.replace("_", "-")

        @app.command(name, help=work.__doc__, epilog=_epilog(name))
        def command(
            config: ConfigFile = "",
            settings: Settings = None,
            run: RunOption = None,
            resume: Resume = None,
            address: Address = None,
            force: Force = False,
        ) -> None:
            cfg, directory = _named(root, config, _over(settings, address), run, resume)
            ends.begins(directory, f"continue with ratchet {name} --resume {quote(str(directory))}")
            work(cfg, directory, resume=resume is not None, force=force)

        return work

    return register


@_in_run_directory(Config)
def train(cfg: Config, directory: Path, *, resume: bool, force: bool) -> None:
    """Train a policy with PPO."""
    from deploy.train import run_training  # slow to import: torch, transformers, Ray

    run_training(cfg, directory, resume=resume, force=force)


@app.command(epilog=_epilog("train"))
def submit(
    config: ConfigFile = "",
    settings: Settings = None,
    address: Annotated[
        str | None,
        typer.Option(help="URL of the cluster's dashboard, such as http://127.0.0.1:8265.", envvar=_DASHBOARD),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Run directory of a new run, on storage that every node sees under this path."),
    ] = None,
    resume: Resume = None,
    force: Force = False,
    follow: Annotated[bool, typer.Option(help="Print the job's log, and exit with its result.")] = True,
) -> None:
    """Train a policy with PPO, as a job of a running Ray cluster. The current directory travels with it."""
    if address is None:
        raise UserError("name the cluster's dashboard with --address, such as http://127.0.0.1:8265")
    if run is None and resume is None:
        raise UserError(
            "name the run directory with --run: the job's own directory is deleted after it, so the run must lie on "
            "storage that every node sees; a relative one is taken from the current directory"
        )
    cfg, modules = _travelling(config, settings or [], run, resume)
    directory = Path(os.path.abspath(resume or run or ""))
    from deploy.run.directory import refuse_overwriting
    from deploy.submit import submit_run

    if resume is None:
        if os.path.lexists(directory):  # it may be seen from the cluster only
            refuse_overwriting(directory, force=force)
        arguments = ["--run", str(directory), *(["--force"] if force else [])]
    else:
        arguments = [*filter(None, [config]), *(settings or []), "--resume", str(directory)]
    resumed = resume is not None
    sys.exit(submit_run(cfg, arguments, directory, resume=resumed, modules=modules, address=address, follow=follow))


@_in_run_directory(RewardTrainingConfig)
def train_reward(cfg: RewardTrainingConfig, directory: Path, *, resume: bool, force: bool) -> None:
    """Train a reward model from preference pairs."""
    from deploy.train_reward import run_reward_training

    run_reward_training(cfg, directory, resume=resume, force=force)


@_in_run_directory(PairSamplingConfig)
def sample_pairs(cfg: PairSamplingConfig, directory: Path, *, resume: bool, force: bool) -> None:
    """Sample two responses to each prompt and have a labeller prefer one."""
    from deploy.sample_pairs import run_pair_sampling

    run_pair_sampling(cfg, directory, resume=resume, force=force)


@app.command(epilog=_epilog("train"))
def evaluate(
    config: Annotated[str, typer.Argument(help="The TOML file of a PPO run, such as RUN/config.toml.")],
    settings: Settings = None,
    policy: Annotated[str | None, typer.Option(help="The policy to judge [default: model.path].")] = None,
    run: Annotated[Path | None, typer.Option(help="Run directory [default: runs/NAME-evaluation].")] = None,
    address: Address = None,
    force: Force = False,
) -> None:
    """Judge a policy on the held-out prompts of a PPO config."""
    path = Path(config)
    cfg = load_config(path, _over(settings, address), Config)
    judged = absolute_if_directory(policy) if policy else None
    name = path.resolve().parent.name if path.name == "config.toml" else path.stem
    directory = run or Path("runs") / f"{name}-evaluation"
    if path.name == "config.toml" and read_record(path.parent):
        directory = directory.absolute()
        find_users_modules(*enter_starting_directory(path.parent)[1])
    else:
        find_users_modules(path.absolute().parent)
    from deploy.evaluate import run_evaluation

    ends.begins(directory, "begin again with --force")
    run_evaluation(cfg, directory, policy=judged, force=force)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The directory of a run of ratchet train, finished or not.")],
    to: Annotated[Path | None, typer.Option(help="A new directory [default: RUN/exported/step-NNNNNN].")] = None,
) -> None:
    """Write the policy of a run's newest checkpoint as a Hugging Face directory."""
    from deploy.export import run_export

    run_export(run, to)


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="The directory of a run that is going on.")],
    generators: Annotated[int | None, typer.Option(help="Generators to have, as the cluster has room.")] = None,
    reward: Annotated[int | None, typer.Option(help="Reward processes to have.")] = None,
    reference: Annotated[int | None, typer.Option(help="Reference processes to have.")] = None,
) -> None:
    """Change how many processes of a role a run has, while it goes on; without options: show them."""
    from deploy.scale import scale as scale_run
    from deploy.scale import show

    wishes = {"Generator": generators, "Reward": reward, "ReferencePolicy": reference}
    show(scale_run(run, {role: number for role, number in wishes.items() if number is not None}))


class Demo(StrEnum):
    rlhf = "rlhf"


@app.command()
def demo(
    name: Annotated[Demo, typer.Argument(help="rlhf: pairs, reward model, PPO, verdict.")],
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

    ends.begins(run, "begin again with --force")
    run_rlhf_demo(run, _over(settings, address), force=force)


class Kind(StrEnum):
    train = "train"
    train_reward = "train-reward"
    sample_pairs = "sample-pairs"


_ROOTS: dict[Kind, type[Root]] = {
    Kind.train: Config,
    Kind.train_reward: RewardTrainingConfig,
    Kind.sample_pairs: PairSamplingConfig,
}


@app.command()
def config(
    config: Annotated[Path | None, typer.Argument(help="A TOML file to resolve and print.")] = None,
    settings: Settings = None,
    kind: Annotated[Kind, typer.Option("--for", help="The command it is for.")] = Kind.train,
    explain: Annotated[bool, typer.Option("--describe", help="Explain every setting.")] = False,
) -> None:
    """Show a resolved config, or explain every setting."""
    if explain:
        typer.echo(_settings(_ROOTS[kind]))
    elif config is not None:
        typer.echo(load_config(config, settings or [], _ROOTS[kind]).to_toml())
    else:
        raise UserError("name a config file to resolve, or ask for --describe")


def _named(
    root: type[AnyRoot], config: str, settings: Sequence[str], run: Path | None, resume: Path | None
) -> tuple[AnyRoot, Path]:
    """The config that was named, or that of the run that continues, and its run directory; from here on the user's
    modules are found."""
    # Names of files stay relative in a job: each job has a current directory of its own.
    travels = IN_A_JOB in os.environ
    if resume is not None:
        cfg = resumed_config(root, resume, _changes(config, settings, run), travels=travels)
        directory, modules = enter_starting_directory(resume)
        find_users_modules(*modules)
        return cfg, directory
    if not config:
        raise UserError("name a config file, such as those in deploy/configs/, or a run directory with --resume")
    cfg = load_config(Path(config), settings, root, keep_relative=travels)
    find_users_modules(Path(config).absolute().parent)
    return cfg, run or Path("runs") / Path(config).stem


def _travelling(
    config: str, settings: Sequence[str], run: Path | None, resume: Path | None
) -> tuple[Config, Sequence[Path]]:
    """As `_named`, for a job: what is in the current directory travels, and is called by its relative name. Gives the
    config, and where in the current directory modules are looked for too."""
    modules = [Path(config).absolute().parent] if resume is None else []
    here = [Path(os.path.relpath(directory)) for directory in modules if directory.is_relative_to(Path.cwd())]
    find_users_modules(*here)
    if resume is not None:
        return resumed_config(Config, resume, _changes(config, settings, run), travels=True), here
    return load_config(Path(config), settings, Config, keep_relative=True), here


def _changes(config: str, settings: Sequence[str], run: Path | None) -> Sequence[str]:
    """The settings that --resume is given; the first one stands where a config file would."""
    if run is not None or config.endswith(".toml"):
        raise UserError("--resume continues with the config of its run directory; give no config file and no --run")
    return [config, *settings] if config else settings


def _over(settings: Sequence[str] | None, address: str | None) -> list[str]:
    """Settings with --address over them: it is ray.address by another name."""
    return [*(settings or []), *([f"ray.address={json.dumps(address)}"] if address else [])]


def main() -> None:
    ends.main(app)


if __name__ == "__main__":  # in a job, where no `ratchet` need be installed
    main()
