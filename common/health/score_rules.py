"""Health rules about scores: constant, saturated, decided by one source, at odds with a judge. Runs anywhere.

Each function takes the history and the config, and says in one sentence what it sees, or returns None.
`judge_falls_in_evaluations` takes evaluations instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median, variance

from common.config.ppo import Config
from common.health.history import START, Change, History, Record, number, score_change, values

# Steps in a row. One step can have equal scores by chance: with 97 % right answers one batch of 64 in seven has.
CONSTANT_STEPS = 3
# Share of the prompts whose responses all score the same. Their advantages are zero (DAPO, arXiv:2503.14476, section
# 3.2): above 0.9, nine in ten rollouts are wasted.
EQUAL_PROMPTS = 0.9
# Share of the scores' spread over the whole run. With 99.7 % right answers it is 0.05 / 0.5.
SMALL_SPREAD = 0.1
SATURATED_STEPS = 5
# Share of the largest source's typical move. A source that always moves the score by less has under 1/400 of the
# total's variance, so it hardly ever decides which of two responses is better.
SMALL_MOVE = 0.05
MOVES = 10  # fewest steps that show how much a source moves
# Steps whose means are compared, at the start and now, and the standard errors by which they must differ. Every step
# is another comparison, so 2 would be too few. By chance one judge in 300 falls by 3.
JUDGED_STEPS, CLEAR = 10, 3.0


def scores_constant(history: History, cfg: Config) -> str | None:
    """Nothing to learn from: all responses to a prompt score the same, and it is not because the task is solved."""
    equal = history.last("rollout/score/zero_std", CONSTANT_STEPS)
    if len(equal) < CONSTANT_STEPS or min(equal) < 1:
        return None
    change = score_change(history.first[:START], list(history.newest)[-CONSTANT_STEPS:], cfg.rollouts_per_step)
    if change is not None and change.rises:
        return None
    spread, score = history.typical("rollout/score/std", 1), history.typical("rollout/score/mean", 1)
    responses = "all responses" if spread == 0 else "all responses to one prompt"
    return f"{responses} scored the same in {CONSTANT_STEPS} steps in a row (mean {score or 0.0:.3g})"


def scores_saturated(history: History, cfg: Config) -> str | None:
    """Little is left to learn from: scores differ far less than they did."""
    if scores_constant(history, cfg) is not None:
        return None
    equal = history.mean("rollout/score/zero_std", SATURATED_STEPS)
    if equal is not None and equal > EQUAL_PROMPTS:
        return f"{equal:.0%} of the prompts have responses that all score the same"
    spread, over_all = history.mean("rollout/score/std", SATURATED_STEPS), history.typical("reward/running_std", 1)
    if not over_all or spread is None or spread >= SMALL_SPREAD * over_all:
        return None
    return f"the spread of the scores is {spread:.2g}, {spread / over_all:.0%} of that of all scores of the run"


def score_dominated(history: History, cfg: Config) -> str | None:
    """Compares how far the mean of each source moves from step to step, which is proportional to the spread of its
    scores. A source that never varies, such as a penalty that nothing incurs, does not count."""
    moves: dict[str, list[float]] = {}
    for source in cfg.reward.sources:
        means = values(history.newest, f"reward/{source.name}/score")
        found = [abs(source.weight * (after - before)) for before, after in pairwise(means)]
        if len(found) >= MOVES and max(found) > 0:
            moves[source.name] = found
    if len(moves) < 2:
        return None
    largest = max(moves, key=lambda name: median(moves[name]))
    typical, others = median(moves.pop(largest)), max(map(max, moves.values()))
    if others >= SMALL_MOVE * typical:
        return None
    return (
        f"{largest} alone decides the score: it moves the mean by {typical:.2g} from step to step, and no other source "
        f"by more than {others:.2g}"
    )


def judge_falls(history: History, cfg: Config) -> str | None:
    """A source of weight 0 judges every training batch: its scores fall while the score rises."""
    if len(history.newest) < 2 * JUDGED_STEPS:
        return None
    before, now = history.first[:JUDGED_STEPS], list(history.newest)[-JUDGED_STEPS:]
    score = score_change(before, now, cfg.rollouts_per_step)
    if score is None or score.amount < CLEAR * score.error or score.amount <= 0:
        return None
    for source in cfg.reward.sources:
        judge = None if source.weight else _change(before, now, f"reward/{source.name}/score")
        if judge is not None and judge.amount < -CLEAR * judge.error:
            return (
                f"the score rose by {score.amount:.2g} since the start while {source.name} fell by {-judge.amount:.2g}"
            )
    return None


def judge_falls_in_evaluations(evaluations: Sequence[Record], cfg: Config) -> str | None:
    """Compares the newest evaluation with the one that the judge scored highest: the judge fell while the score
    rose."""
    *earlier, newest = evaluations
    for judge in cfg.evaluation.judges:
        judged = [(value, record) for record in earlier if (value := _evaluated(record, judge.name)) is not None]
        now = _evaluated(newest, judge.name)
        if not judged or now is None:
            continue
        best, then = max(judged, key=lambda pair: pair[0][0])
        before, after = _evaluated(then, None), _evaluated(newest, None)
        if before is None or after is None:
            continue
        fell, rose = best[0] - now[0], after[0] - before[0]
        if fell > CLEAR * math.hypot(best[1], now[1]) and rose > CLEAR * math.hypot(before[1], after[1]):
            version = then["policy_version"]
            return (
                f"the held-out score rose by {rose:.2g} since version {version} while {judge.name} fell by {fell:.2g}"
            )
    return None


def _change(before: Sequence[Record], now: Sequence[Record], key: str) -> Change | None:
    """The change of a mean whose spread within a step is unknown. Its error comes from the spread of the steps'
    means."""
    groups = [values(records, key) for records in (before, now)]
    if min(map(len, groups)) < JUDGED_STEPS:
        return None
    error = math.sqrt(sum(variance(found) / len(found) for found in groups))
    return Change(fmean(groups[1]) - fmean(groups[0]), error)


def _evaluated(record: Record, judge: str | None) -> tuple[float, float] | None:
    """Mean and standard error of a judge's scores in an evaluation; of the total score without a judge."""
    means, stds = record.get("components"), record.get("component_stds")
    scored = (number(record, "prompts") or 0) - (number(record, "voids") or 0)
    if judge is None:
        mean, std = number(record, "score"), number(record, "score_std")
    elif isinstance(means, Mapping) and isinstance(stds, Mapping):
        mean, std = number(means, judge), number(stds, judge)
        scored -= number(record.get("judge_voids") or {}, judge) or 0
    else:
        return None
    return None if mean is None or std is None or scored <= 0 else (mean, std / math.sqrt(scored))
