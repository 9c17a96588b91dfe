"""The screen of `ratchet train-critic`: rows of its steps, evaluations, explained variance by position.

Runs in the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from common.metrics.table import CRITIC_STEP
from deploy.run.log import RunLog
from deploy.screen.screen import Screen, columns_of
from learner.critic.evaluation import CriticEvaluation, best_of
from learner.critic.rollouts import shown_steps
from learner.critic.training import CriticData, learning_rates
from learner.ppo.critic_quality import PARTS

# Width and text of each column, by the heading in common/metrics/table.py.
_CELLS: dict[str, tuple[int, Callable[[float], str]]] = {
    "step": (7, lambda step: f"{step + 1}"),
    "pass": (7, "{:.2f}".format),
    "loss": (7, "{:.3f}".format),
    "explained": (9, "{:.2f}".format),
    "grad": (7, "{:.1f}".format),
    "tokens": (7, "{:.0f}".format),
    "seconds": (7, "{:.2f}".format),
}
_LEGEND = (
    "pass: passes over the rollouts; loss: half the squared error of the values, mean over tokens",
    "explained: share of the variance of the returns that the values explain, before the step learned",
)


class CriticProgress(Screen):
    """A run of `ratchet train-critic`."""

    def __init__(self, directory: Path, log: RunLog | None = None) -> None:
        super().__init__(directory, columns_of(CRITIC_STEP, _CELLS), _LEGEND, log=log)
        self._num_steps: int | None = None
        self._rates = ""

    def begin(self, data: CriticData) -> None:
        cfg, self._num_steps, self._rates = data.cfg, data.num_steps, learning_rates(data.cfg)
        self._print(
            f"[bold]ratchet train-critic[/] {escape(cfg.model.path)} · {cfg.learner.critic} critic · "
            f"{len(data.rows)} rollouts to learn from, {len(data.heldout)} of held-out prompts · at most "
            f"{cfg.critic_training.passes} passes, {cfg.rollouts_per_step} rollouts a step · seed {cfg.seed}"
        )
        for part in data.rollouts.records():
            steps = shown_steps(slice(part["first"], part["end"]))
            void = f", {len(part['void'])} of them void" if part["void"] else ""
            self._print(escape(f"{part['run']}: steps {steps}{void}, {part['rollouts']} rollouts"), style="dim")
        waited = time.perf_counter() - self._started
        self._print(f"run directory {escape(str(self._directory))}; ready after {waited:.0f} s", style="dim")

    def work(self, name: str, done: int, total: int) -> None:
        """Moves the bar of some work, such as reading the journals. The bar disappears at the end."""
        if done < total:
            self.bars.show(name, done, total)
        else:
            self.bars.hide(name)

    def step(self, record: dict[str, Any]) -> None:
        self._row(record)
        self.bars.show("training", record["step"] + 1, self._num_steps)

    def evaluation(self, evaluation: CriticEvaluation) -> None:
        figures = evaluation.figures
        self._print(
            f"held-out prompts after {evaluation.epoch:g} pass(es): R2 [bold]{evaluation.r2:.3f}[/], explained "
            f"variance {evaluation.explained:.3f} (first token {figures['value/explained_variance/first']:.3f}, last "
            f"{figures['value/explained_variance/last']:.3f}), loss {evaluation.loss:.3f}; "
            f"{time.perf_counter() - self._started:.0f} s"
        )

    def end(self, evaluations: Sequence[CriticEvaluation], *, seconds: float) -> None:
        self.bars.close()
        best = best_of(evaluations)
        table = Table(title=f"after {best.epoch:g} pass(es), on {best.rollouts} held-out rollouts")
        for heading in ("position", "explained variance", "variance of the returns"):
            table.add_column(heading, justify="left" if heading == "position" else "right")
        for key, name in PARTS.items():
            shares = (f"value/explained_variance/{key}", f"value/returns_var/{key}")
            table.add_row(name, *(f"{best.figures[share]:.3f}" for share in shares))
        self._console.print(table)
        self._print(f"all tokens: R2 {best.r2:.3f} (1 - mean squared error / variance of the returns)")
        if best.step == 0:
            self._print(
                "no pass predicted better than the untrained critic, so the untrained one is kept: train on more "
                f"rollouts, or change {self._rates}",
                style="yellow",
            )
        self._end(seconds, "critic/: for learner.critic_path; summary.json, metrics.jsonl, evaluations.jsonl")
