"""Held-out answers that a judge gave no score: how many, why, and a warning of many in a row. Runs in the driver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from common.types import Score, Void

IN_A_ROW = 16  # answers; a judge that fails only now and then gives no warning, but its figures count the failures


def voids_by_judge(scores: Iterable[Score]) -> dict[str, tuple[int, str]]:
    """For each judge that gave some of these answers no score: how many, and the most frequent reason."""
    reasons: dict[str, Counter[str]] = {}
    for score in scores:
        for judge, void in score.judge_voids.items():
            reasons.setdefault(judge, Counter())[void.reason] += 1
    return {judge: (counted.total(), counted.most_common(1)[0][0]) for judge, counted in reasons.items()}


def has_all_scores(score: Score | Void) -> bool:
    """False if a source or a judge failed."""
    return isinstance(score, Score) and not score.judge_voids


class JudgeWatch:
    """Counts how many answers in a row each judge gave no score. Warns once of each judge."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._failed: Counter[str] = Counter()  # answers in a row, by judge
        self._warned: set[str] = set()

    def see(self, score: Score | Void) -> None:
        """Takes the score of the newest answer. A Void says nothing about the judges."""
        if isinstance(score, Void):
            return
        for judge in score.components:
            self._failed.pop(judge, None)
        for judge, void in score.judge_voids.items():
            self._failed[judge] += 1
            if self._failed[judge] >= IN_A_ROW and judge not in self._warned:
                self._warned.add(judge)
                self._report(
                    f"judge {judge} gave no score to {self._failed[judge]} answers in a row, most recently: "
                    f"{void.reason}; the answers keep their other scores, and the figures of the judge leave them out"
                )
