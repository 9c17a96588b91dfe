"""`ratchet tune`: trials of a config, the best one, and which of its settings mattered. Runs in the driver.

    plan.py           draws and checks the trials; metric.py has the metric that compares them
    search.py         runs the trials; ASHA and health rules stop the bad ones; finalists get more seeds
    trial_process.py  the process of one run: `ratchet train` in DIR/trials/...
    events.py         what happened; each event is on disk before the tuning reacts to it
    outcome.py        the best config; comparison.py and sensitivity.py compute which keys mattered

This process needs no Ray cluster, no torch and no model: each run starts its own cluster, or joins the one that its
config names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from deploy.ending import signals
from deploy.restarts import driver_command
from deploy.run.directory import RunDirectory, run_owner
from deploy.run.record import read_record
from deploy.screen.console import complain
from deploy.screen.tune_progress import TuneProgress
from deploy.tune.events import EVENTS, Events
from deploy.tune.halving import check_ray_tune
from deploy.tune.outcome import Outcome, outcome_of, write_outcome
from deploy.tune.plan import Plan
from deploy.tune.search import Search
from deploy.tune.trial_process import POLL_S, STOP_S, Command

HOURS = 1.0


@dataclass(frozen=True)
class Pace:
    """How long a tuning may take, and how many runs it has at the same time. A tuning may continue with another
    pace."""

    hours: float | None = None  # of all starts together; None: as before
    at_once: int = 1


def run_tune(
    directory: Path,
    pace: Pace,
    new: tuple[Plan, Config] | None = None,
    *,
    force: bool = False,
    command: Command = driver_command,
    poll_s: float = POLL_S,
) -> Outcome:
    """Runs the plan of a `new` tuning, or continues the one in `directory`. Writes the outcome, and returns it."""
    check_ray_tune()
    directory = directory.absolute()  # the paths of the trials' directories must not depend on the current directory
    if new is None and not (directory / "config.toml").exists():
        raise UserError(f"{directory} is no run directory (no config.toml); name one that ratchet tune has made")
    with run_owner(directory, resume=new is None, force=force) as owned:
        plan, cfg = new or _planned(directory)
        progress = TuneProgress(directory, plan)
        events, hours = _begun(owned, plan, cfg, pace, progress, begins=new is not None, force=force)
        search = Search(
            plan,
            directory,
            events,
            progress,
            hours,
            at_once=pace.at_once,
            grace_s=cfg.learner.timeout_s if cfg.checkpoint.on_signal else 0.0,
            command=command,
            poll_s=poll_s,
        )
        signals.run(search.run(), grace_s=STOP_S + search.grace_s)
        outcome = outcome_of(search)
        write_outcome(outcome, search)
        progress.end(outcome)
        if outcome.missing:
            hours = math.ceil(search.hours + 1)
            complain(
                f"{outcome.missing} run(s) did not fit into {search.hours:g} hours; continue with "
                f"ratchet tune --resume {quote(str(directory))} --hours {hours}"
            )
    return outcome


def _begun(
    owned: RunDirectory,
    plan: Plan,
    cfg: Config,
    pace: Pace,
    progress: TuneProgress,
    *,
    begins: bool,
    force: bool,
) -> tuple[Events, float]:
    """Begins or continues the tuning in its directory. Returns the events, and the hours of all starts together."""
    directory = owned.directory
    if begins:
        owned.begin(cfg, "tune", force=force)
        plan.write(directory)
    else:
        owned.resume(cfg)
    events = Events(directory / EVENTS)
    hours = pace.hours or events.hours or HOURS
    progress.begin(cfg, hours=hours, used_s=events.seconds, at_once=pace.at_once)
    events.start(hours)
    return events, hours


def _planned(directory: Path) -> tuple[Plan, Config]:
    """The plan and the config of a tuning that continues."""
    if (made_by := read_record(directory).get("command")) not in (None, "tune"):
        raise UserError(f"{directory} was made by ratchet {made_by}; continue it with that command")
    return Plan.read(directory), load_config(directory / "config.toml", [], Config)
