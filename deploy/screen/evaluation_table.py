"""The figures of `ratchet evaluate` on the screen: a table with a column for each policy. Runs in the driver."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from deploy.evaluation.forgetting_rows import forgetting_rows, judge_lines
from deploy.evaluation.rows import crossover_lines, figure_rows
from deploy.screen.progress import evaluation_table
from learner.loop.evaluation import Evaluation


def evaluation_summary(record: Mapping[str, Any]) -> list[Table | str]:
    """What the screen shows at the end of an evaluation."""
    if "reference" in record:  # one answer of one policy to each prompt
        known = {field: record[field] for field in Evaluation.__dataclass_fields__}
        table = evaluation_table({Path(record["policy"]).name: Evaluation.from_record(known)})
        [figures] = record["policies"].values()
        for label, text in forgetting_rows([figures]):
            if cell := text(figures):
                table.add_row(label, cell)
        return [table]
    title = f"{record['prompts']} held-out prompts, {record['samples']} answer(s) of each policy to each"
    table = Table(title=title, caption="in parentheses: 95 % intervals", title_justify="left", caption_justify="left")
    table.add_column("")
    for name in record["policies"]:
        table.add_column(name, justify="right")
    for label, cells in figure_rows(record):
        table.add_row(label, *cells)
    return [table, *crossover_lines(record), *judge_lines(record)]
