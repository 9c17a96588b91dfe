"""The screen of `ratchet evaluate`: a bar, rows while a policy answers, and a table of all. Runs in the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.markup import escape

from actors.pool.replica import PoolEvent
from common.types import Score
from deploy.evaluation.policies import EvaluationPlan
from deploy.run.log import RunLog
from deploy.screen.evaluation_table import evaluation_summary
from deploy.screen.screen import Column, Screen
from deploy.screen.text import duration, short
from learner.loop.answers import Answered

_ROWS = 10  # rows for each policy, at equal numbers of answers


class EvaluationProgress(Screen):
    """An evaluation. With one answer to each prompt it is short, and shows only a bar and its figures at the end."""

    def __init__(self, directory: Path, log: RunLog, plan: EvaluationPlan, prompts: int) -> None:
        columns = [
            Column("answers", 9, "done", "{:.0f}".format),
            Column("score", 7, "score", short),
            Column("tokens", 6, "tokens", short),
            Column("tok/s", 6, "tokens_per_s", short),
            Column("left", 5, "seconds_left", duration),
        ]
        legend = (
            "score, tokens: means of the answers since the row before; tok/s: response tokens",
            "per second of this policy; left: time until the last policy is done",
        )
        super().__init__(directory, columns, legend, log=log)
        self._plan, self._prompts = plan, prompts
        self._total = prompts * plan.samples  # answers of one policy
        self._left: dict[str, int] = {}  # answers that each policy still has to give
        self._given = 0  # answers in this start
        self._busy = 0.0  # seconds that the finished policies took to answer
        self._began = 0.0  # when this policy began to answer
        self._tokens = 0  # in the answers of this policy so far
        self._newest: list[Answered] = []  # answers since the row before

    def pool(self, event: PoolEvent) -> None:
        """A replica joins or leaves."""
        if not (self._plan.is_single and event.event == "joined"):
            super().pool(event)

    def warn(self, message: str) -> None:
        """Writes a warning to the log, and also to the screen, because an evaluation prints few rows."""
        super().warn(message)
        self._print(f"      {escape(message)}", style="yellow")

    def begin(self, left: Mapping[str, int]) -> None:
        """`left`: answers that each policy still has to give."""
        self._left = dict(left)
        if self._plan.is_single:
            return
        done = len(self._plan.paths) * self._total - sum(left.values())
        before = f", {done} of them done already" if done else ""
        self._print(
            f"[bold]ratchet evaluate[/] {escape(', '.join(self._plan.paths))} · {self._prompts} prompts · "
            f"{self._plan.samples} answer(s) of each policy to each{before}"
        )
        self._print(f"run directory {escape(str(self._directory))}; starting Ray actors ...", style="dim")

    def ready(self, name: str) -> None:
        """The engines of this policy are ready."""
        self._began, self._tokens, self._newest = time.perf_counter(), 0, []
        if not self._plan.is_single:
            self._print(f"[bold]{escape(name)}[/] answers: {self._left[name]} of {self._total} are left")

    def answered(self, name: str, answer: Answered) -> None:
        """One more answer is written and scored."""
        self._left[name] -= 1
        self._given += 1
        self._tokens += len(answer.rollout.sampled_ids)
        self._newest.append(answer)
        done, seconds = self._total - self._left[name], time.perf_counter() - self._began
        left_s = (self._busy + seconds) / self._given * sum(self._left.values())
        self.bars.show("evaluation" if self._plan.is_single else name, done, self._total, left_s=left_s)
        if not self._plan.is_single and done * _ROWS // self._total > (done - 1) * _ROWS // self._total:
            self._row(
                {
                    "done": done,
                    **_means(self._newest),
                    "tokens_per_s": self._tokens / seconds,
                    "seconds_left": left_s,
                }
            )
            self._newest = []

    def finished(self, name: str) -> None:
        """This policy has given all answers."""
        self._busy += time.perf_counter() - self._began
        self.bars.hide(name)

    def reading(self, name: str) -> Callable[[int, int], None]:
        """This policy begins to read the texts. The caller calls the result with the windows read so far, and in
        all."""
        if not self._plan.is_single:
            self._print(f"[bold]{escape(name)}[/] reads the texts")

        def read(done: int, total: int) -> None:
            self.bars.show(f"{name}: text", done, total)
            if done == total:
                self.bars.hide(f"{name}: text")

        return read

    def end(self, record: Mapping[str, Any], files: Sequence[str]) -> None:
        """Shows the figures of evaluation.json, and names the files."""
        self.bars.close()
        for part in evaluation_summary(record):
            self._console.print(part, markup=False, soft_wrap=isinstance(part, str))
        self.say(f"{self._directory}: {', '.join(files)}")


def _means(answers: list[Answered]) -> dict[str, float]:
    """Mean tokens and mean score; without the score if no answer has one."""
    scores = [answer.score.total for answer in answers if isinstance(answer.score, Score)]
    tokens = fmean(len(answer.rollout.sampled_ids) for answer in answers)
    return {"tokens": tokens, **({"score": fmean(scores)} if scores else {})}
