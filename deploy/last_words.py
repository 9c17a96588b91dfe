"""Speaks for the driver when it ends without a word. Runs in the driver, and in a small process that waits for its end.

Ray's C++ code ends the driver at once when the node manager (raylet) of its node dies, and SIGKILL ends it anyway: then
the small process prints the message, and removes what the cluster of the run has left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WHY = "this process was killed, or Ray ended it because the node manager (raylet) that it was connected to had died"


class Watcher:
    """Waits for the end of this process, which closes a pipe however it comes."""

    def __init__(self, directory: Path, remedy: str, run: Path | None) -> None:
        """`directory` is removed then; the message ends with `remedy` if `run` holds a config."""
        command = [sys.executable, "-P", "-m", __name__, str(directory), remedy, str((run or Path()).resolve())]
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}
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


def main(directory: Path, remedy: str, run: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the driver
    if sys.stdin.buffer.read():
        return
    begun = any(run.glob("config.toml")) or any(run.glob("*/config.toml"))
    with suppress(OSError):
        advice = f"; {remedy}" if remedy and begun else ""
        print(f"ratchet: {WHY}{advice}", file=sys.stderr, flush=True)
    from deploy.own_cluster import remove  # imports Ray, which takes a second and is seldom needed

    remove(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
