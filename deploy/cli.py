"""The command line `ratchet`: its commands in the order of its help, and its own options. Runs in the driver.

deploy/commands/ has the commands, and deploy/command_line.py what they share. deploy/ending/exit_message.py says how a
command ends.
"""

from __future__ import annotations

import os
import signal
import sys

# Until `main` handles signals, Ctrl-C ends the program at once. Python's own handler would print a traceback of the
# imports below. Other programs that import this module keep their handler, and `nohup` keeps ignoring the signal.
if (__name__ == "__main__" or os.path.basename(sys.argv[0]) == "ratchet") and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from collections.abc import Sequence
from typing import Annotated

import typer

from common.errors import UserError
from deploy.cluster.commands import app as cluster_commands
from deploy.commands import comparisons, examples, operation, results, runs, trainings
from deploy.ending import exit_message
from deploy.run.provenance import ratchets_git_state, versions

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
for part in (runs, trainings, comparisons, results, operation, examples):
    app.add_typer(part.app)
app.add_typer(cluster_commands, name="cluster")


def _show_versions(show: bool) -> None:
    if not show:
        return
    found, git = versions(), ratchets_git_state()
    commit = f" (commit {git['commit'][:12]}{', changed' if git['dirty'] else ''})" if git else ""
    typer.echo(f"ratchet {found.pop('ratchet')}{commit}")
    typer.echo(", ".join(f"{name} {number}" for name, number in found.items()))
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show versions and exit.", callback=_show_versions, is_eager=True)
    ] = False,
) -> None:
    """PPO from human feedback on Ray and vLLM."""
    check_encodings(sys.argv[1:])


def check_encodings(arguments: Sequence[str]) -> None:
    """Raises UserError unless the current directory and the arguments are valid UTF-8. Python turns other bytes into
    characters that cannot be written to any file, and the directory becomes part of file names."""
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


def main() -> None:
    exit_message.main(app)


if __name__ == "__main__":  # a job has no installed `ratchet`
    main()
