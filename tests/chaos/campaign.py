"""Several runs of each scenario until all kills are done, their audits, and the results. Runs in the harness."""

from __future__ import annotations

import random
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.config.ppo import Config
from tests.chaos import audit
from tests.chaos.places import NoNamespaces
from tests.chaos.results import Outcome
from tests.chaos.run import LAST, RunUnderTest
from tests.chaos.scenarios import NUM_PROMPTS, SCENARIOS, Case, Scenario, schedule, shares
from tests.fakes import save_tiny_model


@dataclass
class Campaign:
    """All runs of one call. A run without a fault is removed; one with a fault stays in `home` for inspection."""

    home: Path
    seed: int
    hang_s: float
    steps: int | None = None  # of each run; None: what its scenario has
    say: Callable[[str], None] = print
    outcomes: list[Outcome] = field(default_factory=list)
    findings: list[audit.Findings] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # scenarios that this machine does not allow, with the reason

    def run(self, names: Sequence[str], kills: int, minutes: float, after_run: Callable[[Campaign], None]) -> None:
        """Calls `after_run` after every run, so that results are kept if a later one is stopped."""
        until = time.monotonic() + 60 * minutes
        self._model = save_tiny_model(self.home / "model")
        for name, share in shares(names, kills).items():
            try:
                self._scenario(SCENARIOS[name], share, until, after_run)
            except NoNamespaces as error:
                self.say(f"{name}: skipped: {error}")
                self.skipped[name] = str(error)
        shutil.rmtree(self._model)

    def _scenario(self, scenario: Scenario, kills: int, until: float, after_run: Callable[[Campaign], None]) -> None:
        random_ = random.Random(f"{self.seed} {scenario.name}")
        cases = schedule(scenario.cases, kills, random_)
        undisturbed, number = None, 0
        while cases and time.monotonic() < until:
            if scenario.synchronous and undisturbed is None:
                undisturbed = self._undisturbed(scenario, random_)
            before = len(cases)
            self.one_run(scenario, f"{scenario.name}-{number}", cases, undisturbed, random_)
            after_run(self)
            if len(cases) == before:
                raise RuntimeError(f"{scenario.name}: no case was delivered in a whole run")
            number += 1
        if undisturbed is not None:
            shutil.rmtree(undisturbed.parent)

    def one_run(
        self, scenario: Scenario, title: str, cases: deque[Case], undisturbed: Path | None, random_: random.Random
    ) -> None:
        self.say(f"{title}: {sum(map(len, cases))} kills are left")
        run, cfg = self._new(scenario, title, random_), self._config(scenario)
        outcome = run.train(cases, LAST)
        found = audit.examine(run.directory, seed=cfg.seed, num_prompts=NUM_PROMPTS, max_staleness=cfg.max_staleness)
        if undisturbed is not None:
            found.faults += audit.unequal(run.directory, undisturbed)
        found.faults += audit.replayed(run.directory, run.environment)
        for fault in found.faults:
            self.say(f"  FAULT {fault}")
        self.outcomes.append(outcome)
        self.findings.append(found)
        if not (found.faults or outcome.faults):
            shutil.rmtree(self.home / title)

    def _undisturbed(self, scenario: Scenario, random_: random.Random) -> Path:
        """The run directory of the same config without a kill."""
        self.say(f"{scenario.name}: an undisturbed run")
        run = self._new(replace(scenario, place=""), f"{scenario.name}-undisturbed", random_)
        outcome = run.train(deque())
        if outcome.faults:
            raise RuntimeError(f"the undisturbed run failed: {outcome.faults}")
        return run.directory

    def _config(self, scenario: Scenario) -> Config:
        return scenario.config(self._model, seed=self.seed, steps=self.steps)

    def _new(self, scenario: Scenario, title: str, random_: random.Random) -> RunUnderTest:
        home = self.home / title
        home.mkdir(parents=True)
        return RunUnderTest(
            self._config(scenario), home, kind=scenario.place, random_=random_, hang_s=self.hang_s, say=self.say
        )
