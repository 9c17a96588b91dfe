"""Commands that read a run directory: its policies, its proof, its page.

Runs in the driver. Each command imports its work when it is called: torch, transformers and Ray are slow to import.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import UserError

app = typer.Typer()


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
