"""The loop: in what order things happen. Plain asyncio over roles; no maths, no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import pyarrow as pa

from common.config.ppo import Config
from common.errors import GivenUpError, RolloutLostError
from common.files import append_record, read_records
from common.types import (
    BYTES_PER_TOKEN,
    Decode,
    Experience,
    ExperienceRef,
    Prompt,
    RolloutRef,
    Void,
    experience_table,
    oldest_version,
    staleness,
)
from common.user_code.results import MAX_FIGURES
from learner.loop.agreement import NUM_PROMPTS, MismatchBound, check_engines
from learner.loop.answers import Answer
from learner.loop.buffer import Batch, RolloutBuffer
from learner.loop.evaluation import Evaluation, evaluate
from learner.loop.journal import Journal, JournalError
from learner.loop.prompts import PromptStream
from learner.loop.roles import Generators, LearnerGroup, Reference, Reward
from learner.loop.stopping import completed, save_now
from learner.ppo.experience import arrays
from learner.ranks.checkpoint import Checkpoints

T = TypeVar("T")


@dataclass
class Run:
    """Everything a run is made of, joined."""

    cfg: Config
    directory: Path
    prompts: PromptStream
    heldout: Sequence[Prompt]
    generators: Generators
    reward: Reward
    reference: Reference
    learner: LearnerGroup
    decode: Decode | None = None  # for the text in the journal
    on_step: Callable[[dict[str, Any], Experience, list[Void]], None] = lambda record, example, voids: None
    on_evaluation: Callable[[Evaluation, list[Answer]], None] = lambda evaluation, answers: None
    doing: Callable[[], str] = lambda: "roles start"  # what the loop is waiting for, told to who watches
    journal: Journal = field(init=False)
    checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(self.directory / "journal")
        checkpoint = self.cfg.checkpoint
        self.checkpoints = Checkpoints(self.directory / "checkpoints", every=checkpoint.every, keep=checkpoint.keep)


async def train(run: Run) -> list[Evaluation]:
    """From wherever the run directory stands to num_steps; returns the held-out evaluations, oldest first."""
    cfg, clock = run.cfg, Clock()
    await recover(run)
    run.doing = lambda: "the engines are compared with the learner"
    await check_engines(cfg, run.prompts.probes(NUM_PROMPTS), run.generators, run.learner)
    mismatch = MismatchBound(cfg)
    evaluations = [Evaluation.from_record(record) for record in read_records(run.directory / "evaluations.jsonl")]
    await evaluate_if_due(run, evaluations)
    buffer = RolloutBuffer(
        cfg.rollouts_per_step,
        cfg.max_staleness,
        fetch=partial(fetch, run.generators),
        wanted=(cfg.num_steps - run.learner.step) * cfg.rollouts_per_step,
        max_void_share=cfg.reward.max_void_share,
        max_bytes=cfg.buffer_mib << 20,
        rollout_bytes=BYTES_PER_TOKEN * cfg.max_sequence_tokens,
    )
    producer = asyncio.create_task(produce(run, buffer, clock))
    try:
        while run.learner.step < cfg.num_steps:
            mismatch.check(await _unless_failed(train_step(run, buffer, clock), producer))
            await evaluate_if_due(run, evaluations)
            await buffer.release(cfg.rollouts_per_step)  # after publication, so no rollout is born stale
    except asyncio.CancelledError:
        if cfg.checkpoint.on_signal:
            await save_now(run.learner, run.checkpoints)
        raise
    finally:
        producer.cancel()
        await asyncio.gather(producer, return_exceptions=True)
    run.doing = lambda: "the policy is written"
    await run.learner.save_policy(run.directory / "policy")
    return evaluations


async def train_step(run: Run, buffer: RolloutBuffer, clock: Clock) -> dict[str, float]:
    """One batch from the buffer to new weights on every generator; returns the update's metrics."""
    step = run.learner.step
    clock.start()
    wanted = run.cfg.rollouts_per_step
    run.doing = lambda: f"step {step + 1}: {buffer.num_finished(wanted)} of {wanted} rollouts are written and scored"
    batch = await buffer.take(run.cfg.rollouts_per_step, policy_version=step)
    clock.rollouts_taken()

    given_up = [void.sample_id for void in batch.voids if not void.asked_again]
    run.prompts.settle([row.rollout.prompt.sample_id for row in batch.experience] + given_up)
    run.prompts.give_back([void.sample_id for void in batch.voids if void.asked_again])
    # On disk before anyone learns from it; in a thread, since others wait for this one while the disk syncs.
    table = await asyncio.to_thread(_write_down, run, batch, step, run.prompts.state())
    clock.lap("journal")

    learning = learn(run, batch, table, clock)
    return await (completed(learning) if run.cfg.checkpoint.on_signal else learning)


async def learn(run: Run, batch: Batch, table: pa.Table, clock: Clock) -> dict[str, float]:
    """One batch that is on disk to new weights on every generator; returns the update's metrics."""
    step = run.learner.step
    run.doing = lambda: f"step {step + 1}: the learner learns"
    stats = await run.learner.update(table)
    clock.lap("learn")
    run.doing = lambda: f"step {step + 1}: generators take the new weights"
    sent = await run.generators.load(run.learner.publish(), run.learner.step)
    clock.lap("publish")
    rollouts = _rollout_metrics(table, len(batch.voids), policy_version=step)
    record = {"step": step, "time": time.time(), **rollouts, **batch.stats, **stats, **sent, **clock.laps}
    append_record(run.directory / "metrics.jsonl", record)  # before the checkpoint, after which no replay would do it

    if run.checkpoints.due(run.learner.step, run.cfg.num_steps):
        run.doing = lambda: f"step {step + 1}: a checkpoint is written"
        await run.learner.save(run.checkpoints.path(run.learner.step))
        run.checkpoints.prune()
    clock.lap("checkpoint")
    run.on_step({**record, **clock.laps}, batch.experience[0], batch.voids)
    return stats


async def produce(run: Run, buffer: RolloutBuffer, clock: Clock) -> None:
    """Keeps every slot of the buffer busy: takes a prompt per free slot and has it answered, scored and measured.

    Waits for slots, which `release` and voids free; runs until cancelled, and fails when one of its rollouts does.
    """

    async def scored(written: RolloutRef) -> ExperienceRef | Void:
        clock.text_written()
        if written.fault:  # in the journal it would break every replay
            return Void(written.sample_id, written.fault)
        measuring = asyncio.ensure_future(_ref_logprobs(run, written))
        measuring.add_done_callback(lambda done: done.cancelled() or done.exception())  # if the score fails, too
        try:
            score = await run.reward.score(written)
            ref_logprobs, finite = await measuring
        finally:
            measuring.cancel()
        if isinstance(score, Void):
            return score
        if not finite:
            return Void(written.sample_id, "the reference gave a log-probability that is not finite")
        return ExperienceRef(written, score, ref_logprobs)

    async def fill(ticket: int, prompt: Prompt) -> None:
        outcome: ExperienceRef | Void | None = None
        while outcome is None:
            try:
                outcome = await scored(await run.generators.generate(prompt))
            except RolloutLostError:
                continue  # its tokens went down with a node before they were scored
            except GivenUpError as error:
                outcome = Void(prompt.sample_id, str(error))
        await buffer.put(ticket, outcome)

    async with asyncio.TaskGroup() as rollouts:
        while True:
            ticket = await buffer.admit()
            rollouts.create_task(fill(ticket, run.prompts.next()))


async def _ref_logprobs(run: Run, written: RolloutRef) -> tuple[Any, bool]:
    """None in the first step of a run: the policy that wrote the rollout and will learn from it is the reference."""
    if run.learner.step == 0 and run.cfg.max_staleness == 0:
        return None, True
    return await run.reference.logprobs(written)


async def fetch(generators: Generators, rows: Sequence[ExperienceRef]) -> list[Experience | RolloutLostError]:
    """What a step learns from, brought here."""
    values = await generators.fetch([row.written.rollout for row in rows] + [row.ref_logprobs for row in rows])
    fetched: list[Experience | RolloutLostError] = []
    for row, rollout, ref_logprobs in zip(rows, values[: len(rows)], values[len(rows) :], strict=True):
        lost = next((part for part in (rollout, ref_logprobs) if isinstance(part, RolloutLostError)), None)
        fetched.append(lost or Experience(rollout, row.score, ref_logprobs))
    return fetched


def _write_down(run: Run, batch: Batch, step: int, prompts: dict[str, Any]) -> pa.Table:
    table = experience_table(batch.experience, step=step, decode=run.decode)
    run.journal.append(table, policy_version=step, prompts=prompts, voids=batch.voids)
    return table


async def recover(run: Run) -> None:
    """Brings the learner to the end of the journal and the generators to the learner's weights.

    The journal is the log and a checkpoint only a cache of it: steps written after the newest checkpoint are trained
    again from disk, without generating anything.
    """
    if (checkpoint := run.checkpoints.newest()) is not None:
        await run.learner.restore(checkpoint)
    if run.learner.step > run.journal.next_step:
        raise JournalError(
            f"{checkpoint} has {run.learner.step} steps behind it, the journal only {run.journal.next_step}: its "
            "newest files were lost; restore them, or remove that checkpoint to go on from the journal alone"
        )
    logged = {record["step"] for record in read_records(run.directory / "metrics.jsonl")}
    for written in run.journal.since(run.learner.step):
        run.doing = partial("step {} is learned again from the journal".format, written.step + 1)
        stats = await run.learner.update(written.table)
        if written.step not in logged:
            rollouts = _rollout_metrics(written.table, len(written.voids), policy_version=written.policy_version)
            append_record(
                run.directory / "metrics.jsonl", {"step": written.step, "time": written.time, **rollouts, **stats}
            )
    if (last := run.journal.last()) is not None:
        run.prompts.restore(last.prompts)
    # In a new run, too: it shows whether engines take new weights, before anything is learned.
    await run.generators.load(run.learner.publish(), run.learner.step)


async def evaluate_if_due(run: Run, evaluations: list[Evaluation]) -> None:
    """Adds the evaluation of the policy that the generators hold, where the config wants one and none was made."""
    step, every = run.learner.step, run.cfg.evaluation.every
    wanted = step in (0, run.cfg.num_steps) or (every > 0 and step % every == 0)
    if not (run.heldout and wanted) or any(done.policy_version == step for done in evaluations):
        return
    run.doing = lambda: f"version {step} of the policy answers {len(run.heldout)} held-out prompts"
    evaluation, answers = await evaluate(
        run.heldout,
        run.generators,
        run.reward,
        run.reference if step else None,  # version 0 is the reference
        run.cfg.evaluation,
        policy_version=step,
        max_void_share=run.cfg.reward.max_void_share,
    )
    run.on_evaluation(evaluation, answers)  # keeps the answers: before the record, after which none would
    append_record(run.directory / "evaluations.jsonl", {"time": time.time(), **evaluation.record()})
    evaluations.append(evaluation)


async def _unless_failed(work: Coroutine[Any, Any, T], producer: asyncio.Task[None]) -> T:
    """The result of `work`; or the producer's error if that comes first, since nothing would wake the work then."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, producer}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        unfinished = not task.done()
        if unfinished:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    if unfinished:
        error = producer.exception()
        while isinstance(error, BaseExceptionGroup):  # many rollouts may fail of one cause; the first tells it
            error = error.exceptions[0]
        raise error or RuntimeError("the rollout producer ended by itself")
    return await task


def _rollout_metrics(table: pa.Table, num_voids: int, *, policy_version: int) -> dict[str, float]:
    scores = table["score"].to_numpy()
    components = [dict(row) for row in table["components"].to_pylist()]
    versions = arrays(table, "policy_versions")
    ages = [staleness(oldest_version(row), policy_version) for row in versions]
    return {
        "rollout/score/mean": float(scores.mean()),
        "rollout/score/std": float(scores.std()) if scores.min() < scores.max() else 0.0,
        "rollout/score/zero_std": _equally_scored(table),
        "rollout/response_tokens/mean": sum(map(len, versions)) / len(scores),
        "rollout/finished": table["finish_reason"].to_pylist().count("stop") / len(scores),
        "rollout/voids": num_voids,
        "staleness/min": min(ages),
        "staleness/mean": sum(ages) / len(ages),
        "staleness/max": max(ages),
        **{f"reward/{name}/score": sum(row[name] for row in components) / len(scores) for name in components[0]},
        **_mean_figures(table),
    }


def _mean_figures(table: pa.Table) -> dict[str, float]:
    """The mean of each further figure of the sources, over the rollouts that have it. At most MAX_FIGURES a source, the
    first by name: a function may invent new names for every rollout."""
    values: dict[str, list[float]] = {}
    for row in table["figures"].to_pylist():
        for key, value in row:
            values.setdefault(key, []).append(value)
    kept: list[str] = []
    for _, keys in groupby(sorted(values), key=lambda key: key.partition("/")[0]):
        kept.extend(islice(keys, MAX_FIGURES))
    return {f"reward/{key}": fmean(values[key]) for key in kept}


def _equally_scored(table: pa.Table) -> float:
    """Share of prompts whose responses all score the same. With one response per prompt, the batch is one prompt."""
    by_prompt: dict[tuple[int, int], set[float]] = {}
    keys = zip(table["epoch"].to_pylist(), table["prompt_index"].to_pylist())
    for key, score in zip(keys, table["score"].to_pylist(), strict=True):
        by_prompt.setdefault(key, set()).add(score)
    if len(by_prompt) == table.num_rows:
        return float(len(set(table["score"].to_pylist())) == 1)
    return sum(len(scores) == 1 for scores in by_prompt.values()) / len(by_prompt)


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = self._newest_text = 0.0

    def start(self) -> None:
        self.laps = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/{phase}_s"] = now - self._last
        self._last = now

    def text_written(self) -> None:
        self._newest_text = time.perf_counter()

    def rollouts_taken(self) -> None:
        """Ends two phases: generation at the newest text, scoring now. What overlaps counts as generation."""
        began = self._last
        self.lap("score")
        waited = self.laps["time/score_s"]
        generating = min(max(self._newest_text - began, 0.0), waited)
        self.laps = {
            "wait/learner_s": waited,
            "time/generate_s": generating,
            "time/score_s": waited - generating,
        }
