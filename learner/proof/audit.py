"""Checks a run directory, rule by rule. Runs in `ratchet audit`; only reads.

The journal is read once, from its first entry to its last. Each rule has a class or function of its own next to this
file. The first rule that is broken raises a Violation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.config.description import recorded
from common.config.ppo import Config
from learner.proof.batches import Batches
from learner.proof.chain import Note, Step, Violation, read_chain, read_step
from learner.proof.checkpoints import Found, check_checkpoints
from learner.proof.credit import Credit
from learner.proof.records import Metrics, check_evaluations
from learner.proof.samples import Samples


class Proved(NamedTuple):
    """One line of the table."""

    rule: str
    claim: str
    counts: str


@dataclass
class Audit:
    """The data that the replay needs, and the results of the rules."""

    run: Path
    digests: list[str] = field(default_factory=list)  # of the begin note, then of each step: by policy version
    notes: list[Note] = field(default_factory=list)
    learns: bool = True  # False: a journal of a policy that never learns, so there is nothing derived from it
    metrics: Metrics = field(init=False)
    checkpoints: Found = field(init=False)
    proved: list[Proved] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return len(self.digests) - 1


def audit(run: Path) -> Audit:
    """Raises Violation for the first rule that the run directory breaks."""
    try:
        return _audit(run)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise Violation("contents", f"a file of {run} lacks a value, or has one of another kind ({fault})") from error


def _audit(run: Path) -> Audit:
    found = Audit(run)
    entries = read_chain(run / "journal")
    begin = next(entries)
    assert isinstance(begin, Note)  # read_chain has checked it
    found.digests.append(begin.digest)
    found.notes.append(begin)
    found.learns = begin.about.get("learns", True)
    cfg = begin.about["config"]
    prompts = cfg["prompts"]["rollouts_per_prompt"]
    samples = Samples(seed=cfg["seed"], num_prompts=begin.about["num_prompts"], rollouts_per_prompt=prompts)
    batches = Batches(
        rollouts_per_step=cfg["rollouts_per_step"], max_staleness=cfg["max_staleness"], learns=found.learns
    )
    found.metrics = Metrics(run / "metrics.jsonl" if found.learns else None)
    credit = Credit(run / "credit")
    rules: list[Batches | Samples | Metrics | Credit] = [batches, samples]
    rules += [found.metrics, credit] if found.learns else []
    for entry in entries:
        if isinstance(entry, Step):
            for rule in rules:
                rule.take(entry)
            found.digests.append(entry.digest)
        else:
            _check_note(entry, found)
            found.notes.append(entry)
    voided = {note.about["step"] for note in found.notes if note.kind == "void"}
    batches.finish(voided)
    oldest = f"{sum(batches.tokens.values()):,} tokens; the oldest: {batches.oldest}"
    if not found.learns:
        claim = "version 0 of the policy wrote every token, and nothing was learned"
        proved = [_samples(samples, voided, "in the journal once"), Proved("versions", claim, oldest)]
    else:
        derived = _derived(found, credit)
        claim = f"no token was older than max_staleness ({cfg['max_staleness']}) when it was trained"
        proved = [_samples(samples, voided), Proved("versions", claim, oldest), *derived]
    found.proved = [_chain(found), *proved]
    return found


def _derived(found: Audit, credit: Credit) -> list[Proved]:
    """Checks what the learner has derived from the journal."""
    found.checkpoints = check_checkpoints(found.run / "checkpoints", found.digests, found.notes)
    found.metrics.finish(found.num_steps, max(found.checkpoints.complete, default=0))
    credit.finish(found.num_steps)
    evaluations = check_evaluations(found.run, found.digests)
    missing = len(found.metrics.missing)
    return [
        _checkpoints(found.checkpoints),
        Proved(
            "metrics",
            "each record agrees with its batch",
            f"{len(found.metrics.records):,} records, {found.metrics.values:,} values"
            + (f"; {missing} come when the run continues" if missing else ""),
        ),
        Proved(
            "credit",
            "each file belongs to its batch, and has a value for each token",
            f"{credit.files:,} files, {credit.tokens:,} tokens",
        ),
        Proved("evaluations", "each belongs to this journal, and agrees with its answers", f"{len(evaluations)}"),
    ]


def _check_note(note: Note, found: Audit) -> None:
    """Raises Violation for a note that cannot be true."""
    name, about = f"note {note.number} before step {note.before_step}", note.about
    if note.kind == "void":
        step = about["step"]
        if not 0 <= step < note.before_step or not about["reason"]:
            raise Violation("notes", f"{name} voids step {step}, which it does not follow, or gives no reason")
        if any(earlier.kind == "void" and earlier.about["step"] == step for earlier in found.notes):
            raise Violation("notes", f"{name} voids step {step} a second time")
        if about["sample_ids"] != read_step(found.run / "journal", step).sample_ids:
            raise Violation("notes", f"{name} names other rollouts than those of step {step}")
    elif note.kind == "change":
        if other := sorted(set(about["settings"]) - set(recorded(Config))):
            raise Violation("notes", f"{name} changes {other[0]}, which is fixed when a run begins")
    elif note.kind == "accept" and not about["identity"]:
        raise Violation("notes", f"{name} accepts nothing")


def _chain(found: Audit) -> Proved:
    kinds = [note.kind for note in found.notes]
    named = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    counts = f"{found.num_steps:,} steps, {len(kinds)} notes ({named})"
    return Proved("chain", "every entry has its hash, and the hash of the entry before it", counts)


def _samples(samples: Samples, voided: set[int], kept: str = "trained once") -> Proved:
    in_voided = sum(count for step, count in samples.in_batches.items() if step in voided)
    trained = sum(samples.in_batches.values()) - in_voided
    parts = {
        kept: trained,
        "void with a reason": samples.num_void,
        "in voided batches": in_voided,
        "outstanding": samples.num_outstanding,
    }
    if sum(parts.values()) != samples.issued:
        raise Violation("samples", f"{samples.issued} ids were issued, but {parts} are accounted for")
    counts = " + ".join(f"{count:,} {name}" for name, count in parts.items())
    again = f"; {samples.asked_again:,} were asked again" if samples.asked_again else ""
    return Proved(
        "samples", "every rollout that was asked for is accounted for once", f"{samples.issued:,} = {counts}{again}"
    )


def _checkpoints(found: Found) -> Proved:
    steps = ", ".join(map(str, found.complete)) or "none"
    rest = f"; {found.unfinished} cut short by a crash, never read" if found.unfinished else ""
    claim = "every file is the written one, and its journal entry is in the chain"
    return Proved("checkpoints", claim, f"{len(found.complete)} ({steps}), {found.num_bytes / 1e6:,.1f} MB{rest}")
