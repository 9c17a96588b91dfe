"""The health of a run: which rules hold now, and what each of them tells the user. Runs anywhere.

    health = Health(cfg)
    for record in read_records(run / "metrics.jsonl"):
        events = health.step(record)

The state depends on the records alone. A resumed run and a later report feed it the records of metrics.jsonl and
evaluations.jsonl, and get the same events as the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from common.config.ppo import Config
from common.health import critic_rules, policy_rules, score_rules, system_rules
from common.health.history import History, Record

PAGE = "docs/health.md"
# A rule that keeps holding is one event, which is shown at its 1st, 10th, 100th, ... step. The event continues if its
# rule holds again within QUIET steps.
QUIET = 20

Rule = Callable[[History, Config], str | None]

# Each rule with what to try first. docs/health.md has a paragraph for each.
RULES: dict[str, tuple[Rule, str]] = {
    "kl_negative": (policy_rules.kl_negative, "sample the whole distribution: top_p = 1, top_k = 0"),
    "kl_exploding": (
        policy_rules.kl_exploding,
        "lower optimizer.learning_rate, raise kl.coef, or look for a reward hack",
    ),
    "kl_pinned": (policy_rules.kl_pinned, "raise optimizer.learning_rate, or lower kl.coef"),
    "entropy_collapsing": (
        policy_rules.entropy_collapsing,
        "raise ppo.entropy_coef or kl.coef, or lower the learning rate",
    ),
    "clip_frac_high": (policy_rules.clip_frac_high, "lower optimizer.learning_rate or ppo.ppo_epochs"),
    "approx_kl_high": (policy_rules.approx_kl_high, "lower optimizer.learning_rate, or set ppo.target_kl"),
    "critic_useless": (
        critic_rules.critic_useless,
        "set ppo.value_lam = 1, raise ppo.value_epochs, change the critic's learning rate, or train it before the run "
        "(learner.critic_path)",
    ),
    "critic_late": (
        critic_rules.critic_late,
        "set ppo.value_lam = 1, or start from a critic trained before the run (learner.critic_path)",
    ),
    "critic_miscalibrated": (
        critic_rules.critic_miscalibrated,
        "set ppo.value_lam = 1, raise ppo.value_epochs, or change the critic's learning rate",
    ),
    "scores_constant": (
        score_rules.scores_constant,
        "check the reward on some responses; use easier or harder prompts",
    ),
    "scores_saturated": (score_rules.scores_saturated, "stop here, or use harder prompts"),
    "score_dominated": (score_rules.score_dominated, "bring the sources to one scale with their weights"),
    "judge_falls": (score_rules.judge_falls, "stop at the judge's best version, raise kl.coef, or improve the reward"),
    "length_at_limit": (
        system_rules.length_at_limit,
        "raise that limit, or penalise unfinished responses",
    ),
    "engine_mismatch": (system_rules.engine_mismatch, 'set generators.dtype = "float32" to rule out rounding'),
    "importance_capped": (system_rules.importance_capped, "lower max_staleness or optimizer.learning_rate"),
    "learner_starving": (system_rules.learner_starving, "add generators, or give them a larger share of the GPUs"),
    "generators_starving": (system_rules.generators_starving, "raise max_staleness or learner.ranks"),
    "environments_slow": (
        system_rules.environments_slow,
        "make the environment faster, or let more episodes play at once (max_staleness, environment.concurrent)",
    ),
    "prefixes_lost": (
        system_rules.prefixes_lost,
        "raise a setting that the message names, or lower environment.concurrent",
    ),
    "voids_rising": (system_rules.voids_rising, "read the reasons in RUN/errors and in the journal"),
}
IN_EVALUATIONS = "judge_falls"  # also looks at held-out evaluations


@dataclass(frozen=True)
class Event:
    """A rule that holds."""

    rule: str
    message: str  # what it sees, with the numbers
    remedy: str  # what to try first
    steps: int = 1  # number of steps in which it has held since the event began, this one included
    news: bool = True  # worth a line on the screen

    @property
    def anchor(self) -> str:
        """Link to its paragraph in the docs."""
        return f"{PAGE}#{self.rule}"

    def __str__(self) -> str:
        return f"{self.rule}: {self.message}; {self.remedy} ({self.anchor})"


class Health:
    """Takes the records of a run one after another."""

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._history = History()
        self._evaluations: list[Record] = []
        self._lasting: dict[str, tuple[int, int]] = {}  # by rule: the newest step on which it held, and how often
        self._taken = 0  # records of steps
        self._in_steps: list[Event] = []
        self._in_evaluations: list[Event] = []

    def step(self, record: Record) -> list[Event]:
        """Takes the record of a step. Returns the events of all rules that hold now."""
        self._history.add(record)
        self._taken += 1
        seen = ((name, _message(rule, self._history, self._cfg)) for name, (rule, _) in RULES.items())
        self._in_steps = [self._event(name, message) for name, message in seen if message is not None]
        return self._in_steps

    def evaluation(self, record: Record) -> list[Event]:
        """Takes the record of a held-out evaluation. Returns the events of all rules that hold now."""
        self._evaluations.append(record)
        message = _message(score_rules.judge_falls_in_evaluations, self._evaluations, self._cfg)
        remedy = RULES[IN_EVALUATIONS][1]
        self._in_evaluations = [] if message is None else [Event(IN_EVALUATIONS, message, remedy)]
        return self._in_evaluations

    def follow(self, steps: Iterable[Record], evaluations: Iterable[Record] = ()) -> Health:
        """Takes the records of a run so far."""
        for record in steps:
            self.step(record)
        for record in evaluations:
            self.evaluation(record)
        return self

    @property
    def active(self) -> set[str]:
        """The rules that held in the newest step or the newest evaluation."""
        return {event.rule for event in (*self._in_steps, *self._in_evaluations)}

    def _event(self, name: str, message: str) -> Event:
        newest, held = self._lasting.get(name, (0, 0))
        held = held + 1 if self._taken - newest <= QUIET else 1
        self._lasting[name] = (self._taken, held)
        return Event(name, message, RULES[name][1], held, news=str(held).strip("0") == "1")


def _message(rule: Callable[..., str | None], *seen: Any) -> str | None:
    """The message of a rule, or None. A rule that cannot compute with very large numbers must not end the run."""
    try:
        return rule(*seen)
    except (ArithmeticError, ValueError):  # statistics raises both
        return None


def names(events: Iterable[Event]) -> dict[str, Any]:
    """The part of a record that names the rules of its events, under `health`. Empty without events."""
    found = [event.rule for event in events]
    return {"health": found} if found else {}
