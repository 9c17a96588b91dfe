"""`ratchet train --restarts N`: starts the driver, and starts it again when it fails or is killed.

Runs in the parent process of the driver. This process imports neither torch nor Ray: it needs little memory, and faults
of these libraries do not end it. Driver and parent have the same terminal and the same process group, so Ctrl-C reaches
both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import join
from typing import Any

from common.user_code.packages import package_root
from deploy.ending import exit_message
from deploy.ending.driver_watcher import SUPERVISED
from deploy.ending.signals import SIGNALS
from deploy.screen.console import complain

OPTION = "--restarts"
# Exit codes after which the driver is not restarted: success, an error that the user must fix, and a user's signals.
FINAL = {0, exit_message.USERS_FAULT, *(128 + number for number in SIGNALS)}
LOOK_EVERY_S = 1.0
SUSPENDED_LOOKS = 30  # a driver that is suspended (SIGSTOP) at this many looks in a row is killed
PAUSE_S = 5.0  # the pause grows by this much with each restart in a row that adds no step to the journal
LONGEST_PAUSE_S = 60.0


class Supervisor:
    """Runs the driver of one run, and counts its restarts."""

    def __init__(self, arguments: Sequence[str], directory: Path, *, resume: bool, restarts: int) -> None:
        """`arguments` are those of `ratchet`, without --restarts. With `resume` they continue the run in `directory`,
        otherwise they begin it."""
        self._arguments = list(arguments)
        self._directory = directory
        self._resume = resume
        self._restarts = restarts
        self._before = self._config()
        self._asked: int | None = None  # the first signal that told this process to stop
        self._driver: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Returns when the run has ended, with its exit code."""
        fruitless, steps, code = 0, self._num_steps(), 0
        with self._forwarding_signals():
            for restart in range(self._restarts + 1):
                arguments = self._next_arguments()
                if restart:
                    self._pause(fruitless)
                    if self._asked is not None:
                        stopped = f"{_killed(code)}stopped by {signal.Signals(self._asked).name}"
                        complain(f"{stopped}; continue with {join(['ratchet', *arguments])}")
                        return 128 + self._asked
                    number = f"restart {restart} of {self._restarts}"
                    complain(f"{_killed(code)}{number}: {join(['ratchet', *arguments])}")
                code = self._run_driver(arguments)
                if self._asked is not None or code in FINAL:
                    return code if code >= 0 else 128 - code
                before, steps = steps, self._num_steps()
                fruitless = 0 if steps > before else fruitless + 1
        complain(
            f"{_killed(code)}the run has used up its {self._restarts} restarts ({OPTION}); continue with "
            f"{join(['ratchet', *self._next_arguments()])}"
        )
        return code if code >= 0 else 128 - code

    def _next_arguments(self) -> list[str]:
        """The user's arguments until the run has begun. Then --resume, because RUN/config.toml has every setting."""
        if self._resume or self._config() in (None, self._before):
            return self._arguments
        return ["train", "--resume", str(self._directory)]

    def _config(self) -> tuple[int, int] | None:
        """Identifies the file RUN/config.toml: --force replaces an older run's file by this run's."""
        with suppress(OSError):
            found = os.stat(self._directory / "config.toml")
            return found.st_ino, found.st_mtime_ns
        return None

    def _num_steps(self) -> int:
        return len(list(self._directory.glob("journal/step-*.arrow")))

    def _run_driver(self, arguments: Sequence[str]) -> int:
        """The exit code of the driver; -N if signal N has killed it."""
        environment = {**driver_environment(), SUPERVISED: "1"}  # this process reports it if the driver is killed
        self._driver = driver = subprocess.Popen(driver_command(arguments), env=environment)
        if self._asked is not None:  # the signal came before there was a driver to forward it to
            driver.send_signal(self._asked)
        # Wait in a thread: Popen.wait with a time limit would poll 20 times a second.
        waiting = threading.Thread(target=driver.wait, name="driver", daemon=True)
        waiting.start()
        looks = 0
        while waiting.is_alive():
            waiting.join(LOOK_EVERY_S)
            looks = looks + 1 if _is_suspended(driver.pid) else 0
            if looks >= SUSPENDED_LOOKS:
                complain(f"the driver, process {driver.pid}, has been suspended for {looks * LOOK_EVERY_S:g} s: killed")
                driver.kill()
                looks = 0
        return driver.returncode

    def _pause(self, fruitless: int) -> None:
        """Waits before a restart, but not before the first one. Without the wait, a lasting cause, such as a full
        machine, would use up all restarts within a minute."""
        until = time.monotonic() + min(PAUSE_S * (fruitless - 1), LONGEST_PAUSE_S)
        while self._asked is None and time.monotonic() < until:
            time.sleep(0.1)

    @contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        """During the block, signals that stop a run are passed on to the driver. If the terminal has sent one to both
        processes, the driver gets it twice and counts it once."""

        def forward(number: int, frame: Any) -> None:
            self._asked = number if self._asked is None else self._asked
            if self._driver is not None:
                self._driver.send_signal(number)

        # `exit_message.main` has installed handlers that end this process: it must outlive the driver.
        wakeup = signal.set_wakeup_fd(-1)
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in handlers.items():
            if handler != signal.SIG_IGN:  # nohup
                signal.signal(number, forward)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)


def without_restarts(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command without --restarts and its value."""
    kept, given = [], iter(arguments)
    for argument in given:
        if argument == OPTION:
            next(given, None)
        elif not argument.startswith(f"{OPTION}="):
            kept.append(argument)
    return kept


def driver_command(arguments: Sequence[str]) -> list[str]:
    # -P: the current directory may have a package `deploy` of the user.
    return [sys.executable, "-P", "-m", "deploy.cli", *arguments]


def driver_environment() -> dict[str, str]:
    """The environment with which a driver imports Ratchet from the same place as this process."""
    path = os.pathsep.join(filter(None, [package_root(), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def _killed(code: int) -> str:
    """Why the driver ended, if a signal killed it: it could not report that itself."""
    return f"the driver was ended by {signal.Signals(-code).name}; " if code < 0 else ""


def _is_suspended(pid: int) -> bool:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
