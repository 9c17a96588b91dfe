"""Speaks for the driver when it ends without a word. Runs in the driver, and in a small process that waits for its end.

Ray's C++ code ends the driver at once when the node manager (raylet) of its node dies, and SIGKILL ends it anyway: then
the small process prints the message, and removes what the cluster of the run has left.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WHY = "this process was killed, or Ray ended it because the node manager (raylet) that it was connected to had died"


class Watcher:
    """The small process. It reads from a pipe that the end of this one closes, whatever the cause."""

    def __init__(self, directory: Path, remedy: str, run: Path | None) -> None:
        """`directory` is removed then; the message ends with `remedy` if `run` holds a config."""
        command = [sys.executable, "-P", "-m", __name__, str(directory), remedy, str(run.resolve()) if run else ""]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # signals to the command's group, such as Ctrl-C, are for the driver
        )

    def dismiss(self) -> None:
        """This process ends by itself, with a message of its own."""
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError, ValueError):
            pipe.write(b"dismissed")
            pipe.close()


@contextmanager
def watched(directory: Path, remedy: str = "", run: Path | None = None) -> Iterator[Watcher]:
    watcher = Watcher(directory, remedy, run)
    try:
        yield watcher
    finally:
        watcher.dismiss()
        watcher._process.wait()


def main(directory: Path, remedy: str, run: str) -> None:
    if sys.stdin.buffer.read():
        return
    # Imported now, since they are seldom needed, and this process waits as long as a run.
    from deploy.ending.ends import begun
    from deploy.screen.console import complain

    complain(f"{WHY}; {remedy}" if run and begun(Path(run)) else WHY)
    from deploy.cluster.own_cluster import remove

    remove(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
