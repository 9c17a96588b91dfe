"""A small process that prints the message and cleans up if the driver is killed. Runs in the driver.

The driver ends at once and without a message when it gets SIGKILL. Ray's C++ code ends it in the same way when the node
manager (raylet) of its node dies. `main` runs in the small process: it waits for the driver's end, then prints the
message and removes the directory of the run's cluster.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WAIT_S = 5.0  # longest wait for the small process; it usually ends within milliseconds
SUPERVISED = "RATCHET_SUPERVISED"  # variable of a driver whose parent reports that it was killed, and restarts it
KILLED = "this process was killed, or Ray ended it because the node manager (raylet) that it was connected to had died"


class Watcher:
    """The driver's side of the small process, which reads from a pipe. The pipe closes when the driver ends, for any
    reason."""

    def __init__(self, directory: Path, remedy: str, run: Path | None) -> None:
        """If the driver is killed, `directory` is removed, and the message ends with `remedy` if `run` has a config."""
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
        """Tells the small process that the driver ends normally and prints its own message."""
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError, ValueError):
            pipe.write(b"dismissed")
            pipe.close()

    def wait(self) -> None:
        """Waits until the small process has ended. Kills it after WAIT_S, because it may be suspended."""
        try:
            self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextmanager
def watched(directory: Path, remedy: str = "", run: Path | None = None) -> Iterator[Watcher]:
    """During the block, the small process watches the driver."""
    watcher = Watcher(directory, remedy, run)
    try:
        yield watcher
    finally:
        watcher.dismiss()
        watcher.wait()


def main(directory: Path, remedy: str, run: str) -> None:
    if sys.stdin.buffer.read():
        return
    # Imported only when needed: this process exists as long as the run, and imports take memory.
    from deploy.ending.exit_message import has_config
    from deploy.screen.console import complain

    if SUPERVISED not in os.environ:
        complain(f"{KILLED}; {remedy}" if run and has_config(Path(run)) else KILLED)
    from deploy.cluster.own_cluster import remove

    remove(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
