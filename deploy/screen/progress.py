"""What a person watching a run sees: one line a step, an example now and then, a table of before and after."""

from __future__ import annotations

import asyncio
import math
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from actors.pool.membership import PoolEvent
from actors.pool.pool import Pool
from common.config.ppo import Config
from common.types import Experience, Prompt, Void
from deploy.screen.console import Output, printable
from learner.loop.evaluation import Evaluation


def _step(record: Mapping[str, float]) -> str:
    return f"{record['step']:.0f}/{record['num_steps']:.0f}"


# Heading, width, what a step's record shows there. Together 80 columns.
_COLUMNS: list[tuple[str, int, Callable[[Mapping[str, float]], str]]] = [
    ("step", 9, _step),
    ("score", 7, lambda r: short(r["rollout/score/mean"])),
    ("std", 6, lambda r: short(r["rollout/score/std"])),
    ("KL", 6, lambda r: short(r["kl/per_response"])),
    ("mismatch", 8, lambda r: f"{r['mismatch/kl']:.1e}"),
    ("entropy", 7, lambda r: short(r["ppo/entropy"])),
    ("tokens", 6, lambda r: short(r["rollout/response_tokens/mean"])),
    ("clip", 4, lambda r: f"{r['ppo/clip_frac']:.0%}"),
    ("critic", 6, lambda r: short(r["value/explained_variance"])),
    ("tok/s", 5, lambda r: short(r["tokens_per_s"], 5)),
    ("left", 5, lambda r: duration(r["seconds_left"])),
]
_LEGEND = (  # each at most 80 columns
    "score, std: mean and standard deviation of the scores",
    "KL: from the reference, nats per response; mismatch: learner from generator,",
    "    nats per token; entropy: nats per token; tokens: per response",
    "clip: share of tokens clipped; critic: share of the returns' variance that it",
    "    explains; tok/s: response tokens per second; left: time until the end",
    "below: seconds of the step by phase; one of its prompts and responses",
)
# What the line below says of a step's seconds: word, metric.
_PHASES = [
    ("generate", "time/generate_s"),
    ("reward", "time/score_s"),
    ("learn", "time/learn_s"),
    ("publish", "time/publish_s"),
    ("save", "time/checkpoint_s"),
]


def short(value: float, width: int = 6) -> str:
    """A number with as many decimals, two at most, as `width` characters have room for."""
    for form in (".2f", ".1f", ".0f"):
        if len(text := f"{value:{form}}") <= width:
            return text
    return f"{value:.0e}"


def duration(seconds: float) -> str:
    """Seconds in at most five characters: 42s, 17m, 3h05, 12d."""
    if not math.isfinite(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    if minutes < 100:
        return f"{minutes}m"
    if minutes < 48 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}"
    return f"{seconds / 86400:.0f}d"


_PLURALS = {"Generator": "Generators", "Reward": "Rewards", "ReferencePolicy": "ReferencePolicies"}


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
        self._seconds: deque[float] = deque(maxlen=20)  # of the newest steps
        self._shown_at = time.perf_counter()
        self._equal_steps = 0  # since when all scores of a step are equal

    def begin(self, *, num_prompts: int, num_heldout: int) -> None:
        cfg = self._cfg
        self._print(
            f"[bold]ratchet[/] {escape(cfg.model.path)} · {num_prompts} training prompts, {num_heldout} held out · "
            f"{cfg.num_steps} steps of {cfg.rollouts_per_step} rollouts · seed {cfg.seed}"
        )
        self._print(f"run directory {escape(str(self._directory))}; starting Ray actors ...", style="dim")

    def ready(self, pools: Sequence[Pool], *, dashboard: str | None, figures: str) -> None:
        """`dashboard` is Ray's, `figures` the run's own endpoint, both HOST:PORT."""
        roles = sorted(f"{len(pool)} {pool.role if len(pool) == 1 else _PLURALS[pool.role]}" for pool in pools)
        ranks = self._cfg.learner.ranks
        learner = "Learner" if ranks == 1 else f"Learner of {ranks} ranks"
        reference = ["the reference in it (LoRA)"] if self._cfg.learner.lora is not None else []
        text = ", ".join([*roles, learner, *reference])
        self._print(f"ready after {time.perf_counter() - self._started:.0f} s: {text}", style="dim")
        if dashboard:
            self._print(f"Ray's dashboard: http://{dashboard} (token in {token_place()})", style="dim")
        self._print(f"figures of this run: http://{figures}/metrics", style="dim")

    async def while_silent(self, doing: Callable[[], str], *, after_s: float = 60) -> None:
        """Says what the run is doing whenever nothing has been shown of it for so long. Runs until cancelled."""
        while True:
            probe_timeout_s = time.perf_counter() - self._shown_at
            if probe_timeout_s >= after_s:
                self._shown_at = time.perf_counter()
                self._print(f"      {time.strftime('%H:%M:%S')} {doing()}", style="dim")
            await asyncio.sleep(min(after_s, max(0.01, after_s - probe_timeout_s)))

    def evaluation(self, evaluation: Evaluation) -> None:
        self._shown_at = time.perf_counter()
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
        if evaluation.policy_version == 0:
            self._header()

    def step(self, record: dict[str, Any], example: Experience, voids: Sequence[Void]) -> None:
        self._shown_at = time.perf_counter()
        if not self._header_shown:
            self._header()
        cfg, number = self._cfg, record["step"] + 1
        phases = [(word, record[key]) for word, key in _PHASES if key in record]
        seconds = sum(took for _, took in phases)
        self._seconds.append(seconds)
        left = (cfg.num_steps - number) * statistics.median(self._seconds)
        tokens = record["rollout/response_tokens/mean"] * cfg.rollouts_per_step
        rate = tokens / seconds if seconds else math.nan
        shown = {**record, "step": number, "num_steps": cfg.num_steps, "tokens_per_s": rate, "seconds_left": left}
        self._print(" ".join(f"{cell(shown):>{width}}" for _, width, cell in _COLUMNS))
        spent = ", ".join(f"{word} {took:.1f}" for word, took in phases if took >= 0.05)
        self._print(f"      {seconds:.1f} s: {spent}", style="dim")
        self._warn_of_equal_scores(record)
        for reason, count in Counter(void.reason for void in voids).most_common(3):
            self._print(f"      {count} rollout(s) voided: {escape(reason[:200])}", style="yellow")
        answer = self._tokenizer.decode(example.rollout.response_ids.tolist())
        score = f" = {example.score.total:g}"
        self._print(escape(one_line(question(example.rollout.prompt), answer, score, self._console.width)), style="dim")

    def _warn_of_equal_scores(self, record: Mapping[str, float]) -> None:
        """Says when a step's scores teach nothing; a long row of such steps is told now and then."""
        if record["rollout/score/zero_std"] != 1:
            self._equal_steps = 0
            return
        self._equal_steps += 1
        if self._equal_steps % 10 != 1:
            return
        responses = "all responses" if record["rollout/score/std"] == 0 else "all responses to one prompt"
        since = f" ({self._equal_steps} steps in a row)" if self._equal_steps > 1 else ""
        self._print(
            f"      {responses} score the same{since}: these scores teach nothing. If it stays so, the task is too "
            "hard or too easy, or the reward is broken",
            style="yellow",
        )

    def _header(self) -> None:
        self._header_shown = True
        for line in _LEGEND:
            self._print(line, style="dim")
        self._print(" ".join(f"{heading:>{width}}" for heading, width, _ in _COLUMNS), style="bold")

    def end(self, evaluations: Sequence[Evaluation], *, wins: float | None = None, seconds: float) -> None:
        """`wins`: share of held-out prompts whose answer scores higher after training than before."""
        if evaluations:
            table = evaluation_table({"before": evaluations[0], "after": evaluations[-1]})
            if wins is not None:
                table.add_row("higher score than before", "", f"{wins:.1%}")
            self._console.print(table)
        self._print(
            f"{seconds:.0f} s in all. Run directory: [bold]{escape(str(self._directory))}[/] (summary.json, "
            "metrics.jsonl, journal/, policy/: a Hugging Face directory)"
        )


def token_place() -> str:
    """Where the token is that Ray's dashboard asks for, by Ray's own order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the variable RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"


def question(prompt: Prompt) -> str:
    """What the user asked last, without the chat template around it."""
    asked = [message["content"] for message in prompt.messages or () if message.get("role") == "user"]
    return str(asked[-1]) if asked else prompt.text


def one_line(asked: str, answer: str, score: str, width: int) -> str:
    """Question, answer and score in one line of `width` columns: of the question its end, of the answer its begin."""
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
    row("KL from reference, nats", lambda e: f"{e.kl_per_response:.2f}")
    row("tokens", lambda e: f"{e.response_tokens:.1f}")
    row("distinct-1, -2", lambda e: f"{e.distinct_1:.2f}, {e.distinct_2:.2f}")
    return table
