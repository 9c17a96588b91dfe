"""What a person watching a run sees: one line a step, an example now and then, a table of before and after."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from actors.membership import PoolEvent
from actors.pool import Pool
from common.config import Config
from common.types import Experience, Void
from deploy.console import Output
from learner.evaluation import Evaluation

# heading, metric, format
_COLUMNS = [
    ("step", "step", "{:d}"),
    ("score", "rollout/score/mean", "{:.2f}"),
    ("KL", "kl/per_response", "{:.2f}"),
    ("entropy", "ppo/entropy", "{:.2f}"),
    ("tokens", "rollout/response_tokens/mean", "{:.1f}"),
    ("clip", "ppo/clip_frac", "{:.0%}"),
    ("expl.var", "value/explained_variance", "{:.2f}"),
    ("var.left", "value/variance_ratio", "{:.2f}"),
    ("| gen", "time/generate_s", "{:.1f}"),
    ("score", "time/score_s", "{:.1f}"),
    ("learn", "time/learn_s", "{:.1f}"),
    ("sync", "time/publish_s", "{:.1f}"),
    ("save", "time/checkpoint_s", "{:.1f}"),
]
_LEGEND = (
    "means per step: score; KL from the reference, nats per response; entropy, nats per token; tokens per response; "
    "share of tokens clipped; share of the returns' variance that the critic explains; variance of the advantages over "
    "that of the returns | seconds in each phase"
)


class Screen:
    """What every run shows in the same way."""

    def __init__(self, directory: Path) -> None:
        self._console = Output()
        self._directory = directory
        self._started = time.perf_counter()
        self._header_shown = False

    def pool(self, event: PoolEvent) -> None:
        """Who joins and leaves."""
        calls = f"; {event.calls} call(s) go on elsewhere" if event.calls else ""
        texts = {
            "joined": f"joined {event.seconds:.0f} s after it was placed",
            "leaving": f"is leaving: {event.reason}",
            "left": f"has left{calls}",
            "died": f"died{calls}: {event.reason}",
        }
        text = f"      {event.replica} {texts[event.event]}"
        self._print(escape(text), style="yellow" if event.event == "died" else "dim")

    def _print(self, text: str, **style: Any) -> None:
        self._console.print(text, soft_wrap=True, **style)  # a terminal may wrap; a log file should not


class Progress(Screen):
    """Prints to the terminal; nothing else depends on it."""

    def __init__(self, cfg: Config, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(directory)
        self._cfg = cfg
        self._tokenizer = tokenizer

    def begin(self, *, num_prompts: int, num_heldout: int) -> None:
        cfg = self._cfg
        self._print(
            f"[bold]ratchet[/] {escape(cfg.model.path)} · {num_prompts} training prompts, {num_heldout} held out · "
            f"{cfg.num_steps} steps of {cfg.rollouts_per_step} rollouts · seed {cfg.seed}"
        )
        self._print(f"run directory {escape(str(self._directory))}; starting Ray actors ...", style="dim")

    def ready(self, pools: Sequence[Pool]) -> None:
        roles = sorted(f"{len(pool)} {pool.role}" for pool in pools)
        ranks = self._cfg.learner.ranks
        learner = "Learner" if ranks == 1 else f"Learner of {ranks} ranks"
        reference = ["the reference in it (LoRA)"] if self._cfg.learner.lora is not None else []
        text = ", ".join([*roles, learner, *reference])
        self._print(f"ready after {time.perf_counter() - self._started:.0f} s: {text}", style="dim")

    def evaluation(self, evaluation: Evaluation) -> None:
        low, high = evaluation.interval
        self._print(
            f"held-out pass@1 at version {evaluation.policy_version}: [bold]{evaluation.pass_at_1:.1%}[/] "
            f"({low:.1%} to {high:.1%}, {evaluation.prompts} prompts)"
        )
        if evaluation.voids:
            reason = escape(evaluation.void_reason[:200])
            self._print(f"      {evaluation.voids} answer(s) without a score, most often: {reason}", style="yellow")
        if evaluation.policy_version == 0:
            self._header()

    def step(self, record: dict[str, Any], example: Experience, voids: Sequence[Void]) -> None:
        if not self._header_shown:
            self._header()
        shown = {**record, "step": record["step"] + 1}
        cells = (f"{form.format(shown[key]):>{max(5, len(heading))}}" for heading, key, form in _COLUMNS)
        self._print(" ".join(cells))
        for reason, count in Counter(void.reason for void in voids).most_common(3):
            self._print(f"      {count} rollout(s) voided: {escape(reason[:200])}", style="yellow")
        rollout = example.rollout
        question = " ".join(rollout.prompt.text.split())
        answer = self._tokenizer.decode(rollout.response_ids.tolist())
        self._print(
            f"      {escape(question[-70:])} -> {escape(repr(answer[:60]))} = {example.score.total:g}", style="dim"
        )

    def _header(self) -> None:
        self._header_shown = True
        self._print(_LEGEND, style="dim")
        self._print(" ".join(f"{heading:>5}" for heading, _, _ in _COLUMNS), style="bold")

    def end(self, evaluations: Sequence[Evaluation], *, seconds: float) -> None:
        if evaluations:
            self._console.print(evaluation_table({"before": evaluations[0], "after": evaluations[-1]}))
        self._print(
            f"{seconds:.0f} s in all. Run directory: [bold]{escape(str(self._directory))}[/] (summary.json, "
            "metrics.jsonl, journal/, policy/: a Hugging Face directory)"
        )


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """One column per named evaluation."""
    table = Table(title="held-out prompts, one sampled answer each", title_justify="left")
    table.add_column("")
    for label in evaluations:
        table.add_column(label, justify="right")

    def row(name: str, cells: Callable[[Evaluation], str]) -> None:
        table.add_row(name, *(cells(evaluation) for evaluation in evaluations.values()))

    row("pass@1", lambda e: f"{e.pass_at_1:.1%}")
    row("  95 % interval", lambda e: f"{e.interval[0]:.1%} - {e.interval[1]:.1%}")
    row("score", lambda e: f"{e.score:.3f}")
    for name in dict.fromkeys(name for e in evaluations.values() for name in e.components):
        raw = (e.components.get(name) for e in evaluations.values())
        table.add_row(f"  {name}", *("" if value is None else f"{value:.3f}" for value in raw))
    if any(e.voids for e in evaluations.values()):
        row("answers without a score", lambda e: f"{e.voids}")
    row("KL from reference, nats", lambda e: f"{e.kl_per_response:.2f}")
    row("tokens", lambda e: f"{e.response_tokens:.1f}")
    row("distinct-1, -2", lambda e: f"{e.distinct_1:.2f}, {e.distinct_2:.2f}")
    return table
