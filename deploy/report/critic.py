"""The page's critic tab: how well the critic predicts, by position and by predicted value. Runs anywhere.

The figures of each step come from metrics.jsonl; for `ratchet train-critic`, from each evaluation. The comparison of
predicted with realised returns comes from the credit files, which have the values and rewards of every token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from common.health.critic_rules import LITTLE_VARIANCE
from common.health.history import START, values
from deploy.report.curves import short
from deploy.report.run_files import RunFiles
from deploy.report.steps import Step, StepFiles, lists
from learner.ppo.critic_quality import PARTS, calibration, calibration_error, realised_returns

EXPLAINED = "value/explained_variance/"
VARIANCE = "value/returns_var/realised"
MAX_STEPS = 1000  # most steps in a curve; a longer run shows every second, third, ... step
NEWEST = 10  # steps that are shown together
MAX_TOKENS = 2_000_000  # most tokens of these steps; with more, fewer steps are shown
MAX_CALIBRATIONS = 100  # single steps to choose from

Tokens = tuple[np.ndarray, np.ndarray]  # predicted and realised return of each token of a step


def critic_of(run: RunFiles, files: StepFiles) -> dict[str, Any]:
    """The data of the tab that the curves do not have."""
    known = [r for r in (run.passes if run.is_critic else run.metrics) if values([r], EXPLAINED + "realised")]
    variances = values(known, VARIANCE)
    start = median(variances[:START]) if variances else 0.0
    shown = known[:: 1 + len(known) // MAX_STEPS]
    return {
        "parts": PARTS,
        "steps": [record["step"] for record in shown],
        "explained": {part: [_number(record, EXPLAINED + part) for record in shown] for part in PARTS},
        "variance": [_number(record, VARIANCE) for record in shown],
        "enough": 0.0 if run.is_critic else short(LITTLE_VARIANCE * start),  # a critic's held-out prompts stay the same
        "enough_share": LITTLE_VARIANCE,
        "left": short(variances[-1] / start) if start else None,
        "calibrations": _calibrations(files, float(run.setting("ppo.gamma", 1.0))),
    }


def _number(record: dict[str, Any], key: str) -> float | None:
    return next(iter(map(short, values([record], key))), None)


def _calibrations(files: StepFiles, gamma: float) -> list[dict[str, Any]]:
    """The newest steps together, then single steps, the newest first: {steps: [first, last], bins, error, deviation}.
    Steps without a credit file, or without values in it, are left out."""
    numbers = files.credit_numbers()
    chosen = sorted({*numbers[:: 1 + len(numbers) // MAX_CALIBRATIONS], *numbers[-NEWEST:]})
    single: list[dict[str, Any]] = []
    newest: deque[tuple[int, Tokens]] = deque(maxlen=NEWEST)
    for step in files.each(chosen):
        if (tokens := _tokens(files, step, gamma)) is None:
            continue
        single.insert(0, _calibration([step.number], [tokens]))
        newest.append((step.number, tokens))
        while sum(len(predicted) for _, (predicted, _) in newest) > MAX_TOKENS:
            newest.popleft()
    together = [_calibration(*zip(*newest, strict=True))] if len(newest) > 1 else []
    return together + single


def _calibration(steps: Sequence[int], tokens: Sequence[Tokens]) -> dict[str, Any]:
    predicted, realised = (np.concatenate(part) for part in zip(*tokens, strict=True))
    bins = calibration(predicted, realised, np.ones(len(predicted), bool))
    return {
        "steps": [steps[0], steps[-1]],
        "bins": [[short(b.predicted), short(b.realised), b.tokens] for b in bins],
        "error": short(calibration_error(bins)),
        "deviation": short(float(realised.std())),
    }


def _tokens(files: StepFiles, step: Step, gamma: float) -> Tokens | None:
    """None if the step has no values, or if a number is not finite."""
    credit = files.credit(step, ["values", "rewards", "ends"])
    predicted, rewards, ends = (lists(credit, name) for name in ("values", "rewards", "ends"))
    if predicted is None or rewards is None or ends is None:
        return None
    if not all(np.array_equal(other.offsets, predicted.offsets) for other in (rewards, ends)):
        return None
    numbers, realised = (
        predicted.values.astype(np.float64),
        realised_returns(rewards.values, ends.values, rewards.lengths, gamma=gamma),
    )
    return (numbers, realised) if len(numbers) and np.isfinite([numbers, realised]).all() else None
