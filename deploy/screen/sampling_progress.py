"""The screen while a starting policy is sampled: one row for each batch, and a bar. Runs in the driver."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
from rich.markup import escape

from common.types import Void
from deploy.run.log import RunLog
from deploy.screen.screen import Column, Screen
from deploy.screen.text import duration, short
from learner.loop.batch_metrics import batch_metrics

_BAR = "responses"


class SamplingProgress(Screen):
    """Responses of a policy that does not learn, on their way into a journal."""

    def __init__(self, directory: Path, log: RunLog | None = None) -> None:
        columns = [
            Column("responses", 9, "done", "{:.0f}".format),
            Column("score", 7, "rollout/score/mean", short),
            Column("std", 6, "rollout/score/std", short),
            Column("tokens", 6, "rollout/response_tokens/mean", short),
            Column("tok/s", 5, "tokens_per_s", partial(short, width=5)),
            Column("left", 5, "seconds_left", duration),
        ]
        legend = (
            "score, std: mean and standard deviation of the scores of a batch",
            "tok/s: response tokens per second, so far; left: time until the end",
        )
        super().__init__(directory, columns, legend, log=log)
        self._total = self._done_before = self._done = 0
        self._began = self._tokens = 0.0

    def begin(self, done: int, total: int, *, prompts: int) -> None:
        self._done_before = self._done = done
        self._total = total
        before = f", {done} are in the journal already" if done else ""
        self._print(f"{total} responses of the starting policy to {prompts} prompts{before}; starting engines ...")

    def ready(self) -> None:
        """The engines are ready."""
        self._began = time.perf_counter()

    async def follow(self, finished: Callable[[], int]) -> None:
        """Moves the bar as responses are written and scored. Runs until cancelled."""
        while True:
            self.bars.show(_BAR, finished(), self._total)
            await asyncio.sleep(0.5)

    def batch(self, done: int, table: pa.Table, voids: Sequence[Void]) -> None:
        """A batch is in the journal, which now has `done` responses."""
        seconds = time.perf_counter() - self._began
        left = seconds / (done - self._done_before) * (self._total - done)
        record = batch_metrics(table, [void.kind for void in voids], policy_version=0)
        self._tokens += record["rollout/response_tokens/mean"] * table.num_rows
        self._row({**record, "done": done, "tokens_per_s": self._tokens / seconds, "seconds_left": left})
        for reason, count in Counter(void.reason for void in voids).most_common(3):
            self._print(f"      {count} response(s) voided: {escape(reason[:200])}", style="yellow")
        self._done = done

    def end(self, *, seconds: float) -> None:
        self.bars.close()
        self._print(f"{self._done} responses are in {escape(str(self._directory / 'journal'))}; {seconds:.0f} s")
