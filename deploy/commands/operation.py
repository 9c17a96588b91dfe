"""Commands for runs in progress: the number of their processes, and dashboards.

Runs in the driver. Each command imports its work when it is called: torch, transformers and Ray are slow to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


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
