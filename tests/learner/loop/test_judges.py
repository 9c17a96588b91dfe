"""Judges that fail: counted by reason, and warned of once when they fail on many answers in a row."""

from __future__ import annotations

from common.types import SampleId, Score, Void
from learner.loop.judges import IN_A_ROW, JudgeWatch, has_all_scores, voids_by_judge

FINE, VOID = Score(1.0, {"rm": 1.0, "gold": 0.5}), Void(SampleId(-1, 0, 0), "no service")


def failed(reason: str = "judge gold is down") -> Score:
    return Score(1.0, {"rm": 1.0}, judge_voids={"gold": Void(SampleId(-1, 0, 0), reason)})


def warnings(scores: list[Score | Void]) -> list[str]:
    found: list[str] = []
    watch = JudgeWatch(found.append)
    for score in scores:
        watch.see(score)
    return found


def test_many_failures_in_a_row_give_one_warning_with_their_number():
    [text] = warnings([failed()] * (IN_A_ROW - 1) + [failed("the last straw")] + [FINE] + [failed()] * 2 * IN_A_ROW)
    assert text.startswith(f"judge gold gave no score to {IN_A_ROW} answers in a row, most recently: the last straw;")


def test_a_score_of_the_judge_ends_the_row_and_a_void_does_not():
    assert warnings(([failed()] * (IN_A_ROW - 1) + [FINE]) * 3) == []
    assert len(warnings([failed(), VOID] * IN_A_ROW)) == 1


def test_failures_are_counted_with_their_most_frequent_reason():
    assert voids_by_judge([failed("a"), FINE, failed("b"), failed("b")]) == {"gold": (3, "b")}
    assert voids_by_judge([FINE]) == {}
    assert [has_all_scores(score) for score in (FINE, failed(), VOID)] == [True, False, False]
