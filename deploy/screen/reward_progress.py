"""The screen of `ratchet train-reward`: rows of its steps, evaluations, calibration. Runs in the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from common.config.reward_model import RewardTrainingConfig
from common.metrics.table import REWARD_STEP
from common.model.reward_head import ScoreScale
from deploy.plot_file import plot_file
from deploy.run.log import RunLog
from deploy.screen.screen import Screen, columns_of
from learner.reward_model.calibration import PreferenceEvaluation
from learner.reward_model.pair_records import PairCounts
from learner.reward_model.training import steps_per_epoch

# Width and text of each column, by the heading in common/metrics/table.py.
_CELLS: dict[str, tuple[int, Callable[[float], str]]] = {
    "step": (7, lambda step: f"{step + 1}"),
    "epoch": (7, "{:.2f}".format),
    "loss": (7, "{:.3f}".format),
    "accuracy": (8, "{:.1%}".format),
    "margin": (7, "{:.2f}".format),
    "grad": (7, "{:.1f}".format),
    "tokens": (7, "{:.0f}".format),
    "seconds": (7, "{:.1f}".format),
}


class RewardProgress(Screen):
    """A run of `ratchet train-reward`."""

    def __init__(self, cfg: RewardTrainingConfig, directory: Path, log: RunLog | None = None) -> None:
        super().__init__(directory, columns_of(REWARD_STEP, _CELLS), log=log)
        self._cfg = cfg
        self._num_steps: int | None = None

    def begin(self, counts: dict[str, Any], train: int, heldout: int) -> None:
        cfg = self._cfg
        self._num_steps = cfg.epochs * steps_per_epoch(train, cfg)
        self._print(
            f"[bold]ratchet train-reward[/] {escape(cfg.model.path)} · {train} training pairs, {heldout} held out · "
            f"{cfg.epochs} epoch(s), {cfg.pairs_per_step} pairs a step · seed {cfg.seed}"
        )
        for name, counted in counts.items():
            found = dict(counted)
            shared = found.pop("prompt_in_train", None)
            self._print(f"{name}: {PairCounts(**found)}", style="dim")
            if shared is not None:
                self._print(f"{shared} held-out pairs left out: their prompt is also in the training data", style="dim")
        waited = time.perf_counter() - self._started
        self._print(f"run directory {escape(str(self._directory))}; ready after {waited:.0f} s", style="dim")

    def step(self, record: dict[str, Any]) -> None:
        self._row(record)
        self.bars.show("training", record["step"] + 1, self._num_steps)

    def evaluation(self, evaluation: PreferenceEvaluation) -> None:
        low, high = evaluation.interval
        self._print(
            f"held-out after {evaluation.epoch:g} epoch(s): accuracy [bold]{evaluation.accuracy:.1%}[/] ({low:.1%} to "
            f"{high:.1%}, {evaluation.pairs} pairs), loss {evaluation.loss:.3f}, margin {evaluation.margin:.2f}; "
            f"{time.perf_counter() - self._started:.0f} s"
        )

    def scale(self, done: int, total: int) -> None:
        """Moves the bar: this many responses of the reference policy are scored, to measure the scale of the scores."""
        self.bars.hide("training")
        self.bars.show("scale of the scores", done, total)

    def end(self, evaluations: Sequence[PreferenceEvaluation], scale: ScoreScale | None, *, seconds: float) -> None:
        self.bars.close()
        if evaluations:
            table = Table(title="calibration: probability of the predicted winner, and how often the human agreed")
            for heading in ("predicted", "pairs", "mean", "right", "95 % interval"):
                table.add_column(heading, justify="right")
            for part in evaluations[-1].bins:
                low, high = part.interval
                table.add_row(
                    f"{part.low:.0%} - {part.high:.0%}",
                    f"{part.pairs}",
                    f"{part.predicted:.1%}",
                    f"{part.right:.1%}",
                    f"{low:.1%} - {high:.1%}",
                )
            self._console.print(table)
            self._print(f"calibration error {evaluations[-1].calibration_error:.3f}")
        if scale is not None:
            self._print(
                f"scores of the reference policy's own responses: mean {scale.mean:.3f}, deviation "
                f"{scale.deviation:.3f} (stored with the model: it serves (score - mean) / deviation)"
            )
        files = "model/: the reward model as a Hugging Face directory; summary.json, metrics.jsonl, calibration.png"
        self._end(seconds, files)


def plot_calibration(evaluation: PreferenceEvaluation, target: Path) -> None:
    """Draws the probability of the predicted winner against the share of pairs in which the human agreed, with 95 %
    intervals and numbers of pairs."""
    predicted = [part.predicted for part in evaluation.bins]
    right = [part.right for part in evaluation.bins]
    below = [part.right - part.interval[0] for part in evaluation.bins]
    above = [part.interval[1] - part.right for part in evaluation.bins]
    low, high = evaluation.interval
    with plot_file(target, size=(5, 5)) as [axes]:
        axes.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", label="perfectly calibrated")
        axes.errorbar(
            predicted, right, yerr=[below, above], marker="o", capsize=3, label="held-out pairs, 95 % interval"
        )
        for part in evaluation.bins:
            axes.annotate(f"{part.pairs}", (part.predicted, part.right), textcoords="offset points", xytext=(6, -12))
        axes.set(
            xlabel="probability of the predicted winner",
            ylabel="share of pairs in which the human agreed",
            title=f"accuracy {evaluation.accuracy:.1%} ({low:.1%} - {high:.1%}), {evaluation.pairs} held-out pairs",
            xlim=(0.48, 1.02),
            ylim=(0, 1.02),
        )
        axes.legend(loc="lower right")
