"""Writes the tables of docs/metrics.md from common/metrics/table.py: `python -m tests.metrics_tables`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.metrics.table import CRITIC_STEP, METERS, REWARD_STEP, STEP, Meter, Metric

PAGE = Path(__file__).parents[1] / "docs/metrics.md"
# Keys of a step that only ppo.policy_loss = "mask" and ppo.value_epochs give, and those of an environment.
ENVIRONMENT = {metric.key for metric in STEP if metric.key.startswith(("environment/", "wait/environments"))}
OPTIONAL = {
    "ppo/masked",
    "value/epochs/first_loss",
    "value/epochs/last_loss",
    "value/epochs/grad_norm",
    "time/value_epochs_s",
    *ENVIRONMENT,
}
# A table is between the line <!-- table: NAME --> and the next empty line.
_TABLE = re.compile(r"(?<=^<!-- table: )(\w+) -->\n.*?(?=^$)", flags=re.MULTILINE | re.DOTALL)


def written(page: str) -> str:
    """The page with all tables made again."""
    tables = {
        "step": _metrics(STEP),
        "process": _meters(METERS.values()),
        "reward_step": _metrics(REWARD_STEP),
        "critic_step": _metrics(CRITIC_STEP),
    }
    if (places := sorted(_TABLE.findall(page))) != sorted(tables):
        raise ValueError(f"the page has places for the tables {places}, not for {sorted(tables)}")
    return _TABLE.sub(lambda match: f"{match[1]} -->\n{tables[match[1]]}", page)


def _metrics(metrics: Iterable[Metric]) -> str:
    rows = [[f"`{m.key}`", m.unit, m.reduced_by, m.screen, m.meaning] for m in metrics]
    return _table(["key", "unit", "reduced by", "screen", "meaning, and what a bad value means"], rows)


def _meters(meters: Iterable[Meter]) -> str:
    rows = [[f"`ray_{m.name}`", m.kind, m.unit, ", ".join(m.tags), m.meaning] for m in meters]
    return _table(["metric", "kind", "unit", "tags", "meaning, and what a bad value means"], rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("|".join(f" {cell} " if cell else " " for cell in row) for row in (headings, *rows))
    lines = [head, "|".join(["---"] * len(headings)), *body]
    return "".join(f"|{line}|\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
