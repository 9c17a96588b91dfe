"""A real run of `ratchet train --restarts N`, and the blows to it. Runs in the harness."""

from __future__ import annotations

import math
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from common.config.ppo import Config
from tests.chaos.places import Disk, Nodes, place
from tests.chaos.processes import Marked, Process, of_role, of_run
from tests.chaos.results import Kill, Outcome
from tests.chaos.scenarios import ROOT, Blow, Case
from tests.chaos.watch import Ended, Hang, Watched

REACH_S = 60.0  # longest wait for a point; the blow then comes anyway
GONE_S = 120.0  # longest life of a frozen process
AFTER_S = 30.0  # in which all processes of a run must end after the run
RESTARTS = 10_000
MOST_INTERVENTIONS = 5  # in one run; more end it
LAST = Blow("driver", point="policy written")
SIGNALS = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP, "PAUSE": signal.SIGSTOP}


class RunUnderTest(Watched):
    """Starts the command, delivers cases one after another, each once the run has recovered from the one before, and
    waits for the end. Where the command gives up, a person's `--resume` is counted as an intervention."""

    def __init__(
        self,
        cfg: Config,
        home: Path,
        *,
        kind: str,
        random_: random.Random,
        hang_s: float,
        say: Callable[[str], None],
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`home`: an empty directory for everything. `kind`: of the place. `variables`: others of the environment."""
        self._cfg, self._kind, self._home = cfg, kind, home
        self._random, self.hang_s, self._say = random_, hang_s, say
        self._config, self.output, self.points = home / "config.toml", home / "output", home / "points"
        self._config.write_text(cfg.to_toml(), encoding="utf-8")
        self.points.mkdir()
        self.output.touch()
        self._named = home / ("disk/run" if kind == "disk" else "run")  # as the command sees it
        self.directory = self._named  # as this process sees it
        # A short path, because the paths of Ray's sockets begin with it.
        self._temporary = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
        mark = secrets.token_hex(8)
        self.marked = Marked(mark)
        path = [str(ROOT), str(ROOT / "tests/site")]
        self.environment = {
            **os.environ,
            "CHAOS_MARK": mark,
            "CHAOS_POINTS": str(self.points),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path),
            "TMPDIR": str(self._temporary),
            **(variables or {}),
        }
        self.outcome = Outcome()

    # The whole run

    def train(self, cases: deque[Case], last: Blow | None = None) -> Outcome:
        """Runs to the end, and takes cases until the run is nearly over, and then `last`. Leaves no process behind."""
        self._last = last
        try:
            with place(self._kind, self._home / "disk", self.environment) as self._place:
                self.directory = self._place.seen(self._named)
                self._start(str(self._config), "--run", str(self._named))
                while not self._finished(cases):
                    self.outcome.interventions += 1
                    self._start("--resume", str(self._named))
                self._check_nothing_is_left()
                if self._kind == "disk":
                    shutil.copytree(self.directory, self._home / "run")
                    self.directory = self._home / "run"
        finally:
            self.marked.kill()
            shutil.rmtree(self._temporary, ignore_errors=True)
        return self.outcome

    def _finished(self, cases: deque[Case]) -> bool:
        """Delivers cases. Returns False if somebody has to continue the run by hand."""
        try:
            self.wait_for(lambda: self.steps() >= 2)
            while cases and self.steps() < self._cfg.num_steps - 10:
                pause = self.steps() + self._random.randint(1, 3)
                self.wait_for(lambda pause=pause: self.steps() >= pause)
                self._deliver(cases.popleft())
            if self._last is not None:
                blow, self._last = self._last, None
                self._strike_at_the_end(blow)
            self.wait_for_end()
        except Ended:
            if self.process.returncode == 0:
                return True
            self._fault(f"the command ended with code {self.process.returncode}: {self.last_words()}")
        except Hang:
            self.outcome.hangs += 1
            self._fault(f"hang after {self.steps()} steps: {self.last_words()}")
            self.save_stacks()
            self.marked.kill()
            self.process.wait()
        if self.outcome.interventions >= MOST_INTERVENTIONS:
            self._fault(f"given up; see {self.output}")
            self.marked.kill()
            return True
        return False

    def _strike_at_the_end(self, blow: Blow) -> None:
        """Waits for the blow's point as long as the run continues."""
        try:
            self.outcome.kills.append(self._strike(blow, at_once=True, within_s=math.inf)[0])
        except Ended:
            if self.process.returncode == 0:
                self._fault(f"the run ended and no process came to {blow.point!r}")
            raise

    def _start(self, *arguments: str) -> None:
        command = [*self._place.prefix, sys.executable, "-P", "-m", "deploy.cli", "train", *arguments]
        command += ["--restarts", str(RESTARTS), *self._place.arguments]
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def _check_nothing_is_left(self) -> None:
        """Every process of the run must have ended, and no temporary file may be left."""
        deadline = time.monotonic() + AFTER_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if left:
            self._fault(f"processes left: {[f'{process.pid} {process.command[:60]}' for process in left]}")
        if files := sorted(path.name for path in self._temporary.iterdir()):
            self._fault(f"temporary files left: {files}")

    def _left(self) -> list[Process]:
        """Processes of the run. On a cluster that the harness started, these are its roles and drivers."""
        alive = [process for process in self.marked.look() if process.pid not in self._place.holders]
        return alive if self._kind != "nodes" else of_run(alive)

    # One case

    def _deliver(self, case: Case) -> None:
        for number, blow in enumerate(case):
            kill, began = self._strike(blow, at_once=number > 0)
            self.outcome.kills.append(kill)
        needed = kill.at_step + 1 + self._cfg.max_staleness  # rollouts of earlier steps may have been complete
        try:
            self.wait_for(lambda: self.steps() > needed)
            self._wait_until_gone()
            if blow.how == "STOP" and blow.target in ("gcs", "raylet"):  # until now the run did not notice
                needed = self.steps() + 1 + self._cfg.max_staleness
                self.wait_for(lambda: self.steps() > needed)
        finally:
            kill.next_step_s = self.seconds_until(kill.at_step, began)
            kill.recovery_s = self.seconds_until(needed, began)
            told = "; ".join(f"{blow.target} {blow.how}{f' at {blow.point}' if blow.point else ''}" for blow in case)
            missed = "" if kill.reached else " (point not reached)"
            self._say(f"  step {kill.at_step:4}  {told}{missed}: {_seconds(kill.recovery_s)}")
        if isinstance(self._place, Nodes) and blow.target == "node" and blow.how != "BLIP":
            self._place.repair(self.marked.look())

    def _wait_until_gone(self) -> None:
        """A frozen process keeps its memory: the run must end it."""
        with suppress(TimeoutError):
            deadline = time.monotonic() + GONE_S
            self.wait_for(lambda: not any(one.alive for one in self._frozen), deadline=deadline, poll_s=0.1)
        if left := [f"{one.pid} {one.command[:40]}" for one in self._frozen if one.alive]:
            self._fault(f"still there, frozen: {left}")
        self._frozen = []

    def _strike(self, blow: Blow, *, at_once: bool, within_s: float = REACH_S) -> tuple[Kill, float]:
        """Delivers one blow. Waits at most `within_s` for a process to come to its point. Returns the kill and the time
        at which its consequences begin."""
        reached = self._wait_at(blow.point, within_s) if blow.point else None
        if not blow.point and not at_once:
            time.sleep(self._random.uniform(0, 1))
        victims = self._victims(blow, reached) if blow.how in SIGNALS else []
        self._frozen = victims if blow.how == "STOP" else []
        kill = Kill(blow.target, blow.how, blow.point, self.steps(), reached is not None or not blow.point)
        began = time.time()
        for victim in victims:
            victim.send(SIGNALS[blow.how])
        if blow.how in ("CUT", "BLIP"):
            assert isinstance(self._place, Nodes)
            self._place.cut()
        for waiting in self.points.glob("reached-*"):
            waiting.unlink()
        if blow.how in ("PAUSE", "BLIP"):
            time.sleep(self._random.uniform(1, 2.5))
            for victim in victims:
                victim.send(signal.SIGCONT)
            if isinstance(self._place, Nodes):
                self._place.plug()
        if blow.how == "FILL":
            kill.at_step, began = self._fill_the_disk()
        return kill, began

    def _fill_the_disk(self) -> tuple[int, float]:
        """Somebody frees space after the command has said that the disk is full, and continues the run: no program
        can. Returns the steps and the time of that."""
        assert isinstance(self._place, Disk)
        self._place.fill(self._random.randrange(64 << 10))
        try:
            self.wait_for_end()
        except Ended:
            if "the disk is full" not in self.last_words():
                self._fault(f"the full disk is not named: {self.last_words()}")
        self._place.free()
        self._start("--resume", str(self._named))
        return self.steps(), time.time()

    def _wait_at(self, point: str, within_s: float) -> int | None:
        """The process that reached the point and waits there; None if none came in time."""
        staging, armed = self.points / "staging", self.points / "armed"
        staging.write_text(point, encoding="utf-8")
        staging.rename(armed)
        deadline = time.monotonic() + within_s
        reached: list[Path] = []
        with suppress(TimeoutError):
            self.wait_for(lambda: reached.extend(self.points.glob("reached-*")) or bool(reached), deadline=deadline)
        armed.unlink(missing_ok=True)
        return int(reached[0].name.removeprefix("reached-")) if reached else None

    def _victims(self, blow: Blow, reached: int | None) -> list[Process]:
        """The processes of the blow's target: of several that do the same work one, if possible the one at the
        point."""
        found: list[Process] = []

        def look() -> bool:
            alive = self.marked.look()
            if isinstance(self._place, Nodes) and blow.target == "node":
                found[:] = self._place.of_node(alive)
            else:
                found[:] = of_role(alive, blow.target, self.process.pid)
            return bool(found)

        self.wait_for(look, poll_s=0.3)
        if blow.target == "everything":
            return found
        return [next((process for process in found if process.pid == reached), None) or self._random.choice(found)]

    def _fault(self, fault: str) -> None:
        self.outcome.faults.append(fault)
        self._say(f"  FAULT {fault}")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
