"""The commands of `ratchet`. Runs in the driver.

deploy/command_line.py has what the commands share; deploy/ending/exit_message.py says how a command ends. Each command
imports its work when it is called: torch, transformers and Ray are slow to import.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import typer

from common.config.loading import given_settings, load_config
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.errors import UserError
from common.user_code.import_path import find_users_modules
from deploy.cluster.commands import app as cluster_commands
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
    app,
    config_and_directory,
    config_of_a_job,
    epilog,
    find_modules_of,
    name_of_config,
    refuse_wrong_options,
    run_command,
    run_directory,
    settings_text,
    with_address,
)
from deploy.ending import exit_message
from deploy.evaluation.names import policy_names
from deploy.presets import with_preset
from deploy.shipped import config_file, listing, shipped_text

ROOTS["train"] = Config
ROOTS["train-critic"] = Config
app.add_typer(cluster_commands, name="cluster")


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
    nodes: Annotated[int | None, typer.Option(min=1, metavar="N", help="Nodes of the machines to plan for.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, metavar="N", help="GPUs of each node.")] = None,
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


@run_command(RewardTrainingConfig)
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


@run_command(PairSamplingConfig)
def sample_pairs(cfg: PairSamplingConfig, directory: Path, *, resume: bool, force: bool) -> None:
    """Sample pairs of responses that a labeller compares."""
    from deploy.sample_pairs import run_pair_sampling

    run_pair_sampling(cfg, directory, resume=resume, force=force)


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
        raise UserError(f"{', '.join(alone)}: only with --variance RUN")
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
    hours: Annotated[float | None, typer.Option(min=0.001, metavar="H", help="For all starts. [default: 1]")] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="score, pass_at_1, or a source or judge.")] = None,
    finalists: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Trials with more seeds. [default: 2]")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Seeds of each finalist. [default: 3]")] = None,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Let every trial run to its end: no ASHA.")] = False,
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


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The directory of a run of ratchet train, finished or not.")],
    step: Annotated[int | None, typer.Option(help="A step with a checkpoint [default: the newest].")] = None,
    to: Annotated[Path | None, typer.Option(help="A new directory [default: RUN/exported/step-NNNNNN].")] = None,
) -> None:
    """Write a policy of a run as a Hugging Face directory."""
    from deploy.export import run_export

    run_export(run, to, step)


TrainRun = Annotated[Path, typer.Argument(help="The directory of a run of ratchet train, or a copy of it.")]
AuditedRun = Annotated[
    Path, typer.Argument(help="The directory of a run of ratchet train or of train-critic --sample, or a copy of it.")
]
Layout = Annotated[
    list[str] | None,
    typer.Argument(help="Settings of the layout of devices, such as learner.gpus=0 or learner.ranks=2."),
]
StartingModel = Annotated[
    str | None, typer.Option("--model", help="The model that the run began with, if it is not at model.path any more.")
]
StartingCritic = Annotated[
    str | None, typer.Option("--critic", help="Its trained critic, if it is not at learner.critic_path any more.")
]


@app.command()
def replay(
    run: TrainRun,
    settings: Layout = None,
    to: Annotated[Path | None, typer.Option(help="A new directory.")] = None,
    to_step: Annotated[int | None, typer.Option(min=0, help="Steps to learn [default: all of the journal].")] = None,
    credit: Annotated[
        str | None,
        typer.Option(help="Instead: steps, such as 7 or 7-9, whose values of tokens go to --to [default: RUN/credit]."),
    ] = None,
    from_checkpoint: Annotated[
        bool, typer.Option("--from-checkpoint", help="Begin with the newest checkpoint before it, which is faster.")
    ] = False,
    model: StartingModel = None,
    critic: StartingCritic = None,
) -> None:
    """Rebuild the policy after any step of a run, or the values of its tokens, from its journal."""
    from deploy.replay import rebuild_credit, run_replay

    began: dict[str, Any] = {"model": model, "critic": critic, "settings": settings or []}
    if credit is not None:
        if to_step is not None:
            raise UserError("--to-step chooses a policy, and --credit the values of tokens; name one of them")
        rebuild_credit(run, credit, to=to, from_checkpoint=from_checkpoint, **began)
    elif to is None:
        raise UserError("name a new directory for the policy with --to, or steps with --credit")
    else:
        run_replay(run, to, to_step=to_step, from_checkpoint=from_checkpoint, **began)


@app.command()
def audit(
    run: AuditedRun,
    settings: Layout = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Also learn the whole journal again, and compare every checkpoint.")
    ] = False,
    model: StartingModel = None,
    critic: StartingCritic = None,
) -> None:
    """Prove that a run lost nothing and trained nothing twice. Exit code 1 if it did."""
    from deploy.audit import run_audit

    sys.exit(run_audit(run, replay=replay, model=model, critic=critic, settings=settings or []))


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(help="The directory of a run of ratchet train, train-critic, evaluate or tune.")
    ],
    to: Annotated[Path | None, typer.Option(help="The file to write [default: RUN/report.html].")] = None,
) -> None:
    """Write one HTML file that shows a run: curves, rollouts, tokens, critic, scores."""
    from deploy.report.report import run_report

    run_report(run, to)


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="The directory of a run in progress.")],
    generators: Annotated[int | None, typer.Option(help="Target number of generators.")] = None,
    reward: Annotated[int | None, typer.Option(help="Target number of reward processes.")] = None,
    reference: Annotated[int | None, typer.Option(help="Target number of reference processes.")] = None,
    environments: Annotated[int | None, typer.Option(help="Target number of environment processes.")] = None,
) -> None:
    """Show the processes of a run, or change their number."""
    from deploy.scale import scale as scale_run
    from deploy.scale import show

    targets = {
        "Generator": generators,
        "Reward": reward,
        "ReferencePolicy": reference,
        "Environments": environments,
    }
    show(scale_run(run, {role: number for role, number in targets.items() if number is not None}))


@app.command()
def monitoring(
    directory: Annotated[Path, typer.Argument(help="Where the files go; files of an earlier call are replaced.")],
    prometheus: Annotated[str, typer.Option(help="The address of Prometheus, for Grafana.")] = "http://127.0.0.1:9090",
) -> None:
    """Write what Prometheus and Grafana need to show all runs."""
    from deploy.monitoring.installation import next_commands, write_monitoring

    write_monitoring(directory, prometheus)
    typer.echo(next_commands(directory, prometheus))


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
        typer.echo(settings_text(ROOTS[command]))
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


def main() -> None:
    exit_message.main(app)


if __name__ == "__main__":  # a job has no installed `ratchet`
    main()
