"""The screen of `ratchet train`: rows and examples of its steps, a table of before and after. Runs in the driver."""

from __future__ import annotations

import asyncio
import json
import math
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from actors.pool.pool import Pool
from common.config.ppo import Config
from common.data.questions import question
from common.health.health import Event
from common.metrics.table import STEP
from common.turns import messages_of
from common.types import Experience, Turn, Void
from deploy.run.log import RunLog
from deploy.screen.console import printable
from deploy.screen.screen import Column, Screen, columns_of
from deploy.screen.text import duration, share, short
from learner.loop.evaluation import Evaluation

# The row of a step, 80 columns in all: width and text by the heading in common/metrics/table.py. "step",
# "tok/s" and "left" need more than one value and are made in `Progress.step`.
_CELLS: dict[str, tuple[int, Callable[[float], str]]] = {
    "score": (6, short),
    "std": (5, partial(short, width=5)),
    "KL": (5, partial(short, width=5)),
    "mismatch": (8, "{:.1e}".format),
    "entropy": (7, short),
    "tokens": (6, short),
    "clip": (4, "{:.0%}".format),
    "mask": (4, "{:.0%}".format),
    "critic": (6, share),
    "first": (5, share),
}
_PHASES = {metric.screen: metric.key for metric in STEP if metric.screen and metric.key.startswith("time/")}
_LEGEND = (  # each at most 80 columns
    "score, std: mean and standard deviation of the scores",
    "KL: from the reference, nats per response; mismatch: learner from generator,",
    "    nats per token; entropy: nats per token; tokens: per response",
    "clip or mask: share of tokens that it left without a gradient;",
    "critic: share of the variance of the returns that it predicts, 0 or less: no",
    "    better than a constant; first: the same at first tokens. Both mean little",
    "    once std is near 0",
    "tok/s: response tokens per second; left: time until the end",
    "below: seconds of the step by phase; one of its prompts and responses",
)
SHOWN_TURNS = 4  # of an example
_TRAINING, _EVALUATION = "training", "evaluation"  # bars


class Progress(Screen):
    """A run of `ratchet train`."""

    def __init__(
        self, cfg: Config, directory: Path, tokenizer: PreTrainedTokenizerBase, log: RunLog | None = None
    ) -> None:
        unused = "clip" if cfg.ppo.ratio_to_sampler else "mask"
        columns = [
            Column("step", 7, "step", lambda step: _of_all(int(step) + 1, cfg.num_steps)),
            *columns_of(STEP, {heading: cell for heading, cell in _CELLS.items() if heading != unused}),
            Column("tok/s", 5, "tokens_per_s", partial(short, width=5)),
            Column("left", 5, "seconds_left", duration),
        ]
        super().__init__(directory, columns, _LEGEND, log=log)
        self._cfg = cfg
        self._tokenizer = tokenizer
        self._seconds: deque[float] = deque(maxlen=20)  # of the newest steps
        self._shown_at = time.perf_counter()

    def begin(self, *, num_prompts: int, num_heldout: int) -> None:
        cfg = self._cfg
        self._print(
            f"[bold]ratchet[/] {escape(cfg.model.path)} · {num_prompts} training prompts, {num_heldout} held out · "
            f"{cfg.num_steps} steps of {cfg.rollouts_per_step} rollouts · seed {cfg.seed}"
        )
        self._print(f"run directory {escape(str(self._directory))}; starting Ray actors ...", style="dim")

    def ready(self, pools: Sequence[Pool], *, dashboard: str | None, figures: str) -> None:
        """`dashboard`: address of Ray's dashboard. `figures`: address of the run's endpoint. Both are HOST:PORT."""
        roles = sorted(_counted(len(pool.ready), pool.role) for pool in pools)
        ranks = self._cfg.learner.ranks
        learner = "Learner" if ranks == 1 else f"Learner of {ranks} ranks"
        reference = ["the reference in it (LoRA)"] if self._cfg.learner.lora is not None else []
        text = ", ".join([*roles, learner, *reference])
        self._print(f"ready after {time.perf_counter() - self._started:.0f} s: {text}", style="dim")
        if dashboard:
            self._print(f"Ray's dashboard: http://{dashboard} (token in {token_place()})", style="dim")
        self._print(f"figures of this run: http://{figures}/metrics", style="dim")
        self.bars.show(_TRAINING, 0, None)  # without a total, because a resumed run does not start at 0

    async def while_silent(self, doing: Callable[[], str], *, after_s: float = 60) -> None:
        """Shows what the run is doing: next to its bar, or without a bar in a line after each `after_s` without output.
        Woken by the clock alone. Runs until cancelled."""
        while self.bars:
            self.bars.say(_TRAINING, doing())
            await asyncio.sleep(0.5)
        while True:
            silent_s = time.perf_counter() - self._shown_at
            if silent_s >= after_s:
                self._shown_at = time.perf_counter()
                self._print(f"      {time.strftime('%H:%M:%S')} {doing()}", style="dim")
            await asyncio.sleep(min(after_s, max(0.01, after_s - silent_s)))

    def answered(self, done: int, total: int) -> None:
        """Moves the bar of a held-out evaluation: this many prompts are answered and scored."""
        self.bars.show(_EVALUATION, done, total)

    def evaluation(self, evaluation: Evaluation, events: Sequence[Event] = ()) -> None:
        self._shown_at = time.perf_counter()
        self.bars.hide(_EVALUATION)
        at = f"at version {evaluation.policy_version}"
        if evaluation.pass_at_1 is not None and evaluation.interval is not None:
            low, high = evaluation.interval
            self._print(
                f"held-out pass@1 {at}: [bold]{evaluation.pass_at_1:.1%}[/] ({low:.1%} to {high:.1%}, "
                f"{evaluation.prompts} prompts)"
            )
        else:
            self._print(f"held-out score {at}: [bold]{evaluation.score:.3f}[/] ({evaluation.prompts} prompts)")
        if evaluation.voids:
            reason = escape(evaluation.void_reason[:200])
            self._print(f"      {evaluation.voids} answer(s) without a score, most often: {reason}", style="yellow")
        for judge, count in evaluation.judge_voids.items():
            reason = escape(evaluation.judge_void_reasons[judge][:200])
            text = f"      {count} more answer(s) without a score of {escape(judge)}, most often: {reason}"
            self._print(text, style="yellow")
        self._health(events)
        if evaluation.policy_version == 0:
            self._header()

    def step(
        self, record: dict[str, Any], example: Experience, voids: Sequence[Void], events: Sequence[Event] = ()
    ) -> None:
        self._shown_at = time.perf_counter()
        phases = [(word, record[key]) for word, key in _PHASES.items() if key in record]
        seconds = sum(took for _, took in phases)
        self._seconds.append(seconds)
        left = (self._cfg.num_steps - record["step"] - 1) * statistics.median(self._seconds)
        tokens = record["rollout/response_tokens/mean"] * self._cfg.rollouts_per_step
        rate = tokens / seconds if seconds else math.nan
        self._row({**record, "tokens_per_s": rate, "seconds_left": left})
        self.bars.show(_TRAINING, record["step"] + 1, self._cfg.num_steps, left_s=left)
        spent = ", ".join(f"{word} {took:.1f}" for word, took in phases if took >= 0.05)
        self._print(f"      {seconds:.1f} s: {spent}", style="dim")
        for reason, count in Counter(void.reason for void in voids).most_common(3):
            self._print(f"      {count} rollout(s) voided: {escape(reason[:200])}", style="yellow")
        self._example(example)
        self._health(events)

    def _example(self, example: Experience) -> None:
        """One line with the question and the answer. With an environment, one line for each of SHOWN_TURNS turns: the
        first ones and the last one."""
        rollout, width = example.rollout, self._console.width
        asked, messages = question(rollout.prompt), list(messages_of(rollout.turns, len(rollout.response_ids)))
        last, hidden = len(messages) - 1, len(messages) - SHOWN_TURNS
        for number, (start, end, turn) in enumerate(messages):
            if number < SHOWN_TURNS - 1 or number == last:
                answer = self._tokenizer.decode(rollout.response_ids[start:end].tolist())
                score = f" = {example.score.total:g}" if number == last else ""
                self._print(escape(one_line(asked, answer, score, width)), style="dim")
            elif number == SHOWN_TURNS - 1:
                self._print(f"      ... {hidden} more turn{'s' if hidden > 1 else ''}", style="dim")
            asked = "" if turn is None else said(turn)

    def _health(self, events: Sequence[Event]) -> None:
        """One line for each rule that holds: when it begins, and sometimes while it lasts (`Event.news`)."""
        for event in events:
            if event.news:
                lasting = f" ({event.steps} steps)" if event.steps > 1 else ""
                self._print(f"      {escape(str(event))}{lasting}", style="yellow")

    def end(self, evaluations: Sequence[Evaluation], *, wins: float | None = None, seconds: float) -> None:
        """`wins` is the share of held-out prompts whose answer scores higher after training than before."""
        self.bars.close()
        if evaluations:
            first = evaluations[0].policy_version
            heading = "before" if first == 0 else f"version {first}"
            table = evaluation_table({heading: evaluations[0], "after": evaluations[-1]})
            if wins is not None:
                table.add_row("higher score than before", "", f"{wins:.1%}")
            self._console.print(table)
        self._end(seconds, "summary.json, metrics.jsonl, journal/, policy/: a Hugging Face directory")


def _counted(number: int, role: str) -> str:
    """Such as 1 Generator, 2 ReferencePolicies, or 2 Environments: the name of this role is a plural already."""
    if number == 1 or role.endswith("s"):
        return f"{number} {role}"
    return f"{number} {role[:-1]}ies" if role.endswith("y") else f"{number} {role}s"


def _of_all(step: int, num_steps: int) -> str:
    """Such as 7/200. Without the total if that would make it longer than seven characters."""
    return f"{step}/{num_steps}" if num_steps < 1000 else str(step)


def token_place() -> str:
    """The place of the token for Ray's dashboard. Ray looks in the same order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the variable RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"


def said(turn: Turn) -> str:
    """The texts of what an environment answered."""
    return " ".join(message["content"] for message in json.loads(turn.observation))


def one_line(asked: str, answer: str, score: str, width: int) -> str:
    """Question, answer and score in `width` columns: the end of a long question, the start of a long answer."""
    asked, answer = " ".join(printable(asked).split()), repr(answer)
    room = max(20, width - len(f"       -> {score}"))
    if len(asked) + len(answer) > room:
        kept = max(room // 2, room - len(answer))
        asked = asked if len(asked) <= kept else "..." + asked[len(asked) - kept + 3 :]
        kept = room - len(asked)
        answer = answer if len(answer) <= kept else answer[: kept - 3] + "..."
    return f"      {asked} -> {answer}{score}"


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """One column per named evaluation."""
    table = Table(title="held-out prompts, one sampled answer each", title_justify="left")
    table.add_column("")
    for label in evaluations:
        table.add_column(label, justify="right")

    def row(name: str, cells: Callable[[Evaluation], str]) -> None:
        table.add_row(name, *(cells(evaluation) for evaluation in evaluations.values()))

    if any(e.pass_at_1 is not None for e in evaluations.values()):
        row("pass@1", lambda e: "" if e.pass_at_1 is None else f"{e.pass_at_1:.1%}")
        row("  95 % interval", lambda e: "" if e.interval is None else f"{e.interval[0]:.1%} - {e.interval[1]:.1%}")
    row("score", lambda e: f"{e.score:.3f}")
    for name in dict.fromkeys(name for e in evaluations.values() for name in e.components):
        raw = (e.components.get(name) for e in evaluations.values())
        table.add_row(f"  {name}", *("" if value is None else f"{value:.3f}" for value in raw))
    if any(e.voids for e in evaluations.values()):
        row("answers without a score", lambda e: f"{e.voids}")
    for name in dict.fromkeys(name for e in evaluations.values() for name in e.judge_voids):
        table.add_row(f"... of {name} alone", *(str(e.judge_voids.get(name, 0)) for e in evaluations.values()))
    row("KL from reference, nats", lambda e: f"{e.kl_per_response:.2f}")
    row("tokens", lambda e: f"{e.response_tokens:.1f}")
    row("distinct-1, -2", lambda e: f"{e.distinct_1:.2f}, {e.distinct_2:.2f}")
    return table
