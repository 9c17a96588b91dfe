"""A directory as `ratchet tune` leaves it: six trials, two finalists with two seeds each, and hostile texts."""

from __future__ import annotations

from pathlib import Path

from common.files import write_json
from deploy.run.directory import run_owner
from deploy.tune.events import COMPLETE, EVENTS, FAILED, STOPPED_BY_ASHA, STOPPED_BY_HEALTH, Events
from deploy.tune.plan import Plan
from tests.fakes import tiny_config

STEPS, RUNG = 9, 3
CHOICES, RATES = (0.1, 0.2), (1e-5, 1e-4, 1e-3)
# The score at the rung, and the outcome, of the trials with each choice and each rate.
AT_RUNG = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.5, 5: 0.6, 6: 0.7}
AT_END = {5: 0.62, 6: 0.75}
REPEATS = {5: 0.66, 6: 0.71}


def write_tuning(directory: Path, *, why: str = "below the best third") -> Plan:
    """The first three trials have the first choice. Trial 1 failed, a health rule stopped trial 2, ASHA trials 3 and
    4. `why`: the reasons."""
    trials = [{"ppo.clip_eps": choice, "optimizer.learning_rate": rate} for choice in CHOICES for rate in RATES]
    plan = Plan(
        spaces=("ppo.clip_eps=0.1,0.2", "optimizer.learning_rate=log:1e-5..1e-3"),
        trials=tuple(trials),
        metric="score",
        num_steps=STEPS,
        seed=7,
        every=RUNG,
        given={},
        rungs=(RUNG,),
        finalists=2,
        seeds=2,
    )
    with run_owner(directory) as owned:
        owned.begin(tiny_config("model", seed=7), "tune", force=False)
    plan.write(directory)
    write_json(directory / "tune.json", {"trials": "of an earlier end: nobody reads it"})
    events = Events(directory / EVENTS)
    events.start(1.0)
    for trial, value in AT_RUNG.items():
        name = f"{trial:03d}"
        events.result(name, 0, 0.05)
        events.result(name, RUNG, value)
        if trial in AT_END:
            events.result(name, STEPS, AT_END[trial])
            events.end(name, COMPLETE, 120.0)
        else:
            outcome = {1: FAILED, 2: STOPPED_BY_HEALTH}.get(trial, STOPPED_BY_ASHA)
            events.stop(name, outcome, why)
            events.end(name, outcome, 60.0, why)
    for trial, value in REPEATS.items():
        events.result(f"{trial:03d}-repeat-1", STEPS, value)
        events.end(f"{trial:03d}-repeat-1", COMPLETE, 120.0)
    return plan
