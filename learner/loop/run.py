"""The parts of a run, connected with each other, and what its loop is doing now. Runs in the driver."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.config.ppo import Config
from common.experience_table import Decode
from common.files import append_record, read_records
from common.health.health import Event, Health, names
from common.types import Experience, Prompt, Void
from learner.loop.answers import Answer
from learner.loop.checkpoints import Checkpoints
from learner.loop.credit import CreditFiles
from learner.loop.evaluation import Evaluation
from learner.loop.journal import Journal
from learner.loop.judges import JudgeWatch
from learner.loop.prompts import PromptStream
from learner.loop.roles import Generators, LearnerGroup, Reference, Reward


class Sampler(Protocol):
    """The parts that turn prompts into batches of the journal. A run has them, and so has the sampling of a policy that
    never learns."""

    cfg: Config
    prompts: PromptStream
    generators: Generators
    reward: Reward
    reference: Reference
    decode: Decode | None
    newest_text: float
    journal: Journal


@dataclass
class Run:
    """The parts of a run, and the seconds of the current step by phase."""

    cfg: Config
    directory: Path
    prompts: PromptStream
    heldout: Sequence[Prompt]
    generators: Generators
    reward: Reward
    reference: Reference
    learner: LearnerGroup
    model_type: str = "unknown"  # from the policy's config.json, for messages
    decode: Decode | None = None  # for the text in the journal
    on_step: Callable[[dict[str, Any], Experience, list[Void], list[Event]], None] = lambda *step: None
    on_evaluation: Callable[[Evaluation, list[Answer], list[Event]], None] = lambda *evaluation: None
    on_answer: Callable[[int, int], None] = lambda done, total: None  # of a held-out evaluation
    report: Callable[[str], None] = lambda message: print(message, file=sys.stderr)  # about faults that it survives
    doing: Callable[[], str] = lambda: "the processes start"  # for the screen
    seconds: dict[str, float] = field(default_factory=dict)  # of the current step, by metric
    newest_text: float = 0.0  # when a response was last written, on time.perf_counter's clock
    losses: int = 0  # of learner ranks, since the learner last reached a new step
    furthest: int = 0  # the most steps that the learner has done
    logged: set[int] = field(default_factory=set)  # the steps that have a record in metrics.jsonl
    configured: Config = field(init=False)  # the config that the learner has
    journal: Journal = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    credit: CreditFiles = field(init=False)
    health: Health = field(init=False)
    judges: JudgeWatch = field(init=False)

    def __post_init__(self) -> None:
        self.configured = self.cfg
        self.journal = Journal(self.directory / "journal")
        checkpoint = self.cfg.checkpoint
        self.checkpoints = Checkpoints(
            self.directory / "checkpoints", every=checkpoint.every, keep=checkpoint.keep, journal=self.journal
        )
        self.credit = CreditFiles(
            self.directory, every=self.cfg.credit.every, journal=self.journal, report=lambda text: self.report(text)
        )
        self.health = Health(self.cfg)
        self.judges = JudgeWatch(lambda text: self.report(text))

    def read_health(self) -> None:
        """Brings the health rules to the end of the records on disk."""
        files = [self.directory / name for name in ("metrics.jsonl", "evaluations.jsonl")]
        self.health = Health(self.cfg).follow(*map(read_records, files))

    def log(self, record: dict[str, Any]) -> list[Event]:
        """Writes the record of a step into metrics.jsonl, with the health rules that hold. Returns their events."""
        events = self.health.step(record)
        append_record(self.directory / "metrics.jsonl", {**record, **names(events)})
        self.logged.add(record["step"])
        return events

    @contextmanager
    def phase(self, name: str, doing: str) -> Iterator[None]:
        """A phase of a step: shown while it lasts, and measured as `time/NAME_s`."""
        self.doing = lambda: doing
        began = time.perf_counter()
        yield
        self.seconds[f"time/{name}_s"] = time.perf_counter() - began

    def waited_for_batch(self, began: float) -> None:
        """Starts the seconds of a step with its wait for the batch. The time until the newest response was written is
        generation, the rest is scoring."""
        waited = time.perf_counter() - began
        generating = min(max(self.newest_text - began, 0.0), waited)
        self.seconds = {
            "wait/learner_s": waited,
            "time/generate_s": generating,
            "time/score_s": waited - generating,
        }
