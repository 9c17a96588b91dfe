"""The health rules that stop a trial early. Runs anywhere.

When one of these rules holds, the policy will probably not recover, and further steps waste time. The other rules warn
of lost time, of faults that a later step may repair, or of faults that do not depend on the settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STEPS = 3  # consecutive steps in which the rule must hold
RUINED = {
    "kl_exploding": "the KL from the reference doubled, and the score rose less than the penalty",
    "entropy_collapsing": "the policy repeats itself, and the score has not risen",
    "scores_constant": "all responses to a prompt score the same: nothing is learned",
}


def ruined(records: Sequence[Mapping[str, Any]]) -> str | None:
    """The reason to stop a run with these records of metrics.jsonl; None if there is none."""
    newest = records[-STEPS:]
    if len(newest) < STEPS:
        return None
    for rule, meaning in RUINED.items():
        if all(rule in record.get("health", ()) for record in newest):
            return f"{rule} in {STEPS} steps in a row, up to step {newest[-1]['step'] + 1}: {meaning}"
    return None
