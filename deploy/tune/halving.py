"""Asynchronous successive halving (ASHA, arXiv:1810.05934), as Ray Tune computes it. Runs in the driver.

Only Ray Tune's scheduler is used, without a cluster. Ray Tune's own loop would need one more Ray cluster, and would
continue from snapshots after a kill. Here every decision can be computed again from DIR/events.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common.errors import UserError

REDUCTION = 3  # a trial continues if it is in the best third of those that reached the same rung


def rungs(first: int, num_steps: int) -> list[int]:
    """The steps at which trials are compared: each is REDUCTION times the one before, and the last is below the end."""
    found = [first]
    while found[-1] * REDUCTION < num_steps:
        found.append(found[-1] * REDUCTION)
    return [step for step in found if step < num_steps]


class Halving:
    """Decides at each rung whether a trial continues. `results`: (trial, step, value) of earlier starts of the command,
    oldest first."""

    def __init__(self, at: Iterable[int], results: Iterable[tuple[str, int, float]] = ()) -> None:
        self._rungs = sorted(at)
        self._scheduler = _scheduler(self._rungs)
        self._trials: dict[str, Any] = {}
        # Trials that the earlier results stop. A killed command may not have recorded these stops.
        self.stopped = {result[0] for result in results if not self.continues(*result)}

    def continues(self, trial: str, step: int, value: float) -> bool:
        """Takes a result, and says whether the trial continues. Between rungs every trial does."""
        if step not in self._rungs or self._scheduler is None:
            return True
        if trial not in self._trials:
            self._trials[trial] = _trial(trial)
            self._scheduler.on_trial_add(None, self._trials[trial])
        result = {"step": step, "value": value}
        return bool(self._scheduler.on_trial_result(None, self._trials[trial], result) == "CONTINUE")


def check_ray_tune() -> None:
    """Raises UserError if Ray Tune is not installed."""
    try:
        import ray.tune  # noqa: F401, imported here because it takes two seconds, and no other command needs it
    except ImportError as error:
        raise UserError(
            f"ratchet tune needs Ray Tune, which cannot be imported ({str(error).splitlines()[0]}); call pip install "
            "'ratchet-rlhf[tune]'"
        ) from None


def _scheduler(at: list[int]) -> Any:
    """None without rungs: then every trial runs to its end."""
    if not at:
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="step",
        metric="value",
        mode="max",
        grace_period=at[0],
        max_t=at[-1] + 1,  # the scheduler counts rungs with logarithms: 243 would round down to below 3 ** 5
        reduction_factor=REDUCTION,
        stop_last_trials=False,  # a trial that continues at the last rung runs to its end
    )


def _trial(name: str) -> Any:
    """A trial for the scheduler, which uses only its id."""
    from ray.tune.experiment import Trial

    return Trial("ratchet", trial_id=name, stub=True)
