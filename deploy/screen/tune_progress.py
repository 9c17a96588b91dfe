"""The screen of `ratchet tune`: each trial with its evaluations, a bar, and tables at the end. Runs in the driver."""

from __future__ import annotations

import time
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from common.config.overrides import as_overrides, toml_text
from common.config.ppo import Config
from deploy.screen.screen import Screen
from deploy.screen.text import duration, significant
from deploy.tune.comparison import effect_text, sentence, title_of, unselected, value_of
from deploy.tune.events import COMPLETE, CUT, FAILED, RunState
from deploy.tune.following import Job
from deploy.tune.outcome import Outcome
from deploy.tune.plan import Plan
from deploy.tune.sensitivity import FEWEST

_BAR = "runs"


class TuneProgress(Screen):
    """A tuning."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        super().__init__(directory)
        self._plan = plan

    def begin(self, cfg: Config, *, hours: float, used_s: float, at_once: int) -> None:
        plan = self._plan
        before = f", {duration(used_s)} of them used before" if used_s > 1 else ""
        self._print(
            f"[bold]ratchet tune[/] {escape(cfg.model.path)} · {len(plan.trials)} trials of {plan.num_steps} steps, "
            f"{at_once} at once · {plan.metric} of {cfg.evaluation.prompts} held-out prompts every {plan.every} "
            f"step(s) · {hours:g} hours{before} · seed {plan.seed}"
        )
        compared = ", ".join(map(str, plan.rungs))
        stops = f"ASHA compares at steps {compared}" if compared else "ASHA stops no trial"
        self._print(
            f"{stops}; then {plan.finalists} finalist(s) with {plan.seeds} seeds. Run directories: "
            f"{escape(str(self._directory / 'trials'))}",
            style="dim",
        )
        for text in plan.spaces:
            self._print(escape(f"  {text}"), style="dim")

    def started(self, job: Job, *, continues: bool) -> None:
        settings = " ".join(as_overrides(self._plan.trials[job.trial - 1]))
        verb = " continues" if continues else ""
        self._print(f"[bold]{self._name(job)}[/]{verb}: {escape(settings)}")
        self.bars.say(_BAR, self._name(job))

    def result(self, job: Job, step: int, value: float) -> None:
        self._print(f"  {self._name(job)} step {step}: {self._plan.metric} {significant(value)}")
        self.bars.say(_BAR, f"{self._name(job)}, step {step} of {self._plan.num_steps}")

    def ended(self, job: Job, state: RunState) -> None:
        seconds = duration(state.seconds)
        if state.outcome == COMPLETE:
            self._print(f"  {self._name(job)} is complete after {seconds}")
            return
        failed = state.outcome in (None, FAILED)
        how = f"ended early after {seconds} ({state.outcome})"
        if state.outcome is None:
            how = f"failed after {seconds}, and is tried again after the others"
        self._print(escape(f"  {self._name(job)} {how}: {state.why}"), style="yellow" if failed else "dim")

    def progress(self, done: int, total: int, left_s: float | None) -> None:
        self.bars.show(_BAR, done, total, left_s=left_s)

    def end(self, outcome: Outcome) -> None:
        self.bars.close()
        self._trials(outcome)
        self._sensitivity(outcome)
        self._print(f"[bold]best[/]: {escape(outcome.reason)}")
        if outcome.finalists:
            settings = self._plan.trials[outcome.finalists[0].trial - 1]
            self._print(f"  {escape(' '.join(as_overrides(settings)))}")
        best = "best.toml: for ratchet train; " if outcome.finalists else ""
        self._end(time.perf_counter() - self._started, f"{best}tune.json, sensitivity.json")

    def _trials(self, outcome: Outcome) -> None:
        steps = [*self._plan.rungs, self._plan.num_steps]
        table = Table(title=f"{self._plan.metric} of each trial at equal steps")
        table.add_column("trial", justify="right")
        for step in steps:
            table.add_column(f"step {step}", justify="right")
        table.add_column("end")
        table.add_column("settings", overflow="fold")
        for number, state in sorted(outcome.states.items()):
            values = [significant(state.results[step]) if step in state.results else "-" for step in steps]
            settings = " ".join(as_overrides(self._plan.trials[number - 1]))
            table.add_row(str(number), *values, state.outcome or CUT, escape(settings))
        self._console.print(table)

    def _sensitivity(self, outcome: Outcome) -> None:
        at = unselected(outcome.compared)
        if not at.effects:
            self._print(f"{len(at.numbers)} trial(s) at step {at.step}: at least {FEWEST} are needed to compare keys")
            return
        spaces = {space.key: space for space in self._plan.keys}
        table = Table(title=title_of(at))
        for heading in ("key", "explained", "95 %", "effect", "best near"):
            table.add_column(heading, justify="left" if heading in ("key", "effect") else "right")
        for effect in at.effects:
            low, high = effect.explained_interval
            space = spaces[effect.key]
            best = toml_text(value_of(space, effect.best))
            interval = f"{low:.0%} to {high:.0%}"
            table.add_row(
                escape(effect.key),
                f"{effect.explained:.0%}",
                interval,
                escape(effect_text(effect, space)),
                escape(best),
            )
        self._console.print(table)
        for effect in at.effects:
            self._print(escape(sentence(self._plan, at, effect)), style="" if effect.mattered else "dim")
        noise = outcome.seed_deviation
        if noise is not None:
            self._print(f"standard deviation between seeds of one trial: {significant(noise, 2)}", style="dim")

    def _name(self, job: Job) -> str:
        repeat = f", seed {self._plan.seed + job.repeat}" if job.repeat else ""
        return f"trial {job.trial}{repeat}"
