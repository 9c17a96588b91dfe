"""The loop: in what order things happen. Plain asyncio over roles: no maths, no Ray. Runs in the driver.

coroutine               consumes             waits for                                    woken by
`produce`               a slot and a prompt  free slots and memory                        `release`, `take`, voids
`_fill`, per rollout    an issued prompt     response, score, reference log-probabilities the pools
`train_step`            one batch            the buffer's oldest rollouts, then journal,  `put`, then each role
                                             learner (`bring_to_end`) and generators
`train`                 -                    `train_step`, or an error of `produce`       either of them

With `rollouts_per_step` = 2 and `max_staleness` = 1, in the order of time:

    produce      admits 4 prompts: a b c d
    _fill        b is scored; then a
    train_step   takes a and b, and writes them to the journal; the learner learns, and generators finish c and d
    train_step   publishes version 1 and waits until every generator holds it
    train        releases two slots
    produce      admits 2 prompts: e f, which version 1 answers
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from common.errors import GivenUpError, RolloutLostError
from common.experience_table import experience_table
from common.futures import unless_failed
from common.types import Experience, ExperienceRef, Prompt, RolloutRef, Void
from learner.loop.agreement import NUM_PROMPTS, MismatchBound, check_engines
from learner.loop.batch_metrics import batch_metrics
from learner.loop.buffer import Batch, RolloutBuffer
from learner.loop.checkpoints import completed, save_now
from learner.loop.evaluation import Evaluation
from learner.loop.evaluations import evaluate_if_due
from learner.loop.recovery import bring_to_end, publish, recover, with_learner, without_learner
from learner.loop.roles import Generators
from learner.loop.run import Run, Sampler


async def train(run: Run) -> list[Evaluation]:
    """Trains from the state of the run directory to `num_steps`; returns the held-out evaluations, oldest first."""
    cfg = run.cfg
    evaluations = await recover(run)
    run.doing = lambda: "the engines are compared with the learner"
    probes = run.prompts.probes(NUM_PROMPTS)
    await with_learner(run, lambda: check_engines(cfg, run.model_type, probes, run.generators, run.learner))
    mismatch = MismatchBound(cfg)
    await evaluate_if_due(run, evaluations)
    buffer = RolloutBuffer(
        cfg.rollouts_per_step,
        cfg.max_staleness,
        fetch=partial(fetch, run.generators),
        group_size=cfg.group_size,
        wanted=(cfg.num_steps - run.learner.step) * cfg.rollouts_per_step,
        max_void_share=cfg.reward.max_void_share,
        max_bytes=cfg.buffer_mib << 20,
        rollout_bytes=cfg.longest_rollout_bytes,
    )
    producer = asyncio.create_task(produce(run, buffer))
    try:
        while run.learner.step < cfg.num_steps:
            mismatch.check(await unless_failed(train_step(run, buffer), producer))
            await evaluate_if_due(run, evaluations)
            await buffer.release(cfg.rollouts_per_step)  # after publication, so no rollout is born stale
    except asyncio.CancelledError:
        if cfg.checkpoint.on_signal and run.learner.step >= run.furthest:  # else a step is being learned again
            await save_now(run.learner, run.checkpoints)
        raise
    finally:
        producer.cancel()
        await asyncio.gather(producer, return_exceptions=True)
    run.doing = lambda: "the policy is written"
    await with_learner(run, lambda: run.learner.save_policy(run.directory / "policy"))
    if not cfg.checkpoint.keep_optimizer_at_end:
        await asyncio.to_thread(run.checkpoints.drop_optimizers)
    return evaluations


async def train_step(run: Run, buffer: RolloutBuffer) -> dict[str, float]:
    """Takes a batch from the buffer, journals it and learns from it (`learn`). Returns the update's metrics."""
    step, wanted = run.learner.step, run.cfg.rollouts_per_step
    run.doing = lambda: f"step {step + 1}: {buffer.num_finished(wanted)} of {wanted} rollouts are generated and scored"
    began = time.perf_counter()
    batch = await without_learner(run, buffer.take(wanted, policy_version=step))
    run.waited_for_batch(began)

    with run.phase("journal", f"step {step + 1}: the batch is written to disk"):
        table = await write_down(run, batch, policy_version=step)

    learning = learn(run, batch, table)
    return await (completed(learning) if run.cfg.checkpoint.on_signal else learning)


async def learn(run: Run, batch: Batch, table: pa.Table) -> dict[str, float]:
    """Brings the learner to the end of the journal, which now has this batch. Then sends its weights to all generators,
    logs the step, and saves a checkpoint if one is due. Returns the update's metrics: only one if the batch is void."""
    step = run.learner.step
    with run.phase("learn", f"step {step + 1}: the learner learns"):
        stats = await bring_to_end(run, live=step)
    with run.phase("publish", f"step {step + 1}: generators take the new weights"):
        sent = await with_learner(run, partial(publish, run), live=step)
    rollouts = batch_metrics(table, [void.kind for void in batch.voids], policy_version=step)
    record = {"step": step, "time": time.time(), **rollouts, **batch.stats, **stats, **sent, **run.seconds}
    events = run.log(record)  # before checkpointing: recovery logs only steps newer than the checkpoint

    with run.phase("checkpoint", f"step {step + 1}: a checkpoint is written"):
        if run.checkpoints.due(run.learner.step, run.cfg.num_steps):
            await with_learner(run, partial(save_now, run.learner, run.checkpoints))
    run.on_step({**record, **run.seconds}, batch.experience[0], batch.voids, events)
    return stats


async def produce(run: Sampler, buffer: RolloutBuffer) -> None:
    """Keeps every slot of the buffer busy. Consumes slots and prompts. Waits for slots, which `release` and voids free,
    and for memory, which `take` frees. Runs until cancelled, and fails when one of its rollouts fails."""
    async with asyncio.TaskGroup() as rollouts:
        while True:
            ticket = await buffer.admit()
            for member in range(run.cfg.group_size):
                rollouts.create_task(_fill(run, buffer, ticket, member, run.prompts.next()))


async def _fill(run: Sampler, buffer: RolloutBuffer, ticket: int, member: int, prompt: Prompt) -> None:
    """Gets a response to one prompt, its score and its reference log-probabilities, and puts them into the buffer.
    Waits for the pools. If the tokens are lost with a node, it starts again."""
    outcome: ExperienceRef | Void | None = None
    while outcome is None:
        try:
            ref = await run.generators.generate(prompt)
            run.newest_text = time.perf_counter()
            outcome = await _scored(run, ref)
        except RolloutLostError:
            continue
        except GivenUpError as error:
            outcome = Void(prompt.sample_id, str(error), kind=error.kind)
    await buffer.put(ticket, outcome, member)


async def _scored(run: Sampler, ref: RolloutRef) -> ExperienceRef | Void:
    """Asks reward and reference about the response at the same time. Waits for both pools."""
    if ref.fault:  # a replay from the journal would fail at this rollout every time
        return Void(ref.sample_id, ref.fault)
    measuring = asyncio.ensure_future(_ref_logprobs(run, ref))
    measuring.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio would print its error
    try:
        score = await run.reward.score(ref)
        ref_logprobs, finite = await measuring
    finally:
        measuring.cancel()
    if isinstance(score, Void):
        return score
    if not finite:
        return Void(ref.sample_id, "the reference gave a log-probability that is not finite")
    return ExperienceRef(ref, score, ref_logprobs)


async def _ref_logprobs(run: Sampler, ref: RolloutRef) -> tuple[Any, bool]:
    """None in the first step of a synchronous run, because the policy that wrote the rollout is the reference."""
    if run.journal.next_step == 0 and run.cfg.max_staleness == 0:
        return None, True
    return await run.reference.logprobs(ref)


async def fetch(generators: Generators, rows: Sequence[ExperienceRef]) -> list[Experience | RolloutLostError]:
    """Brings the tokens and log-probabilities of a batch into this process."""
    values = await generators.fetch([row.ref.rollout for row in rows] + [row.ref_logprobs for row in rows])
    fetched: list[Experience | RolloutLostError] = []
    for row, rollout, ref_logprobs in zip(rows, values[: len(rows)], values[len(rows) :], strict=True):
        lost = next((part for part in (rollout, ref_logprobs) if isinstance(part, RolloutLostError)), None)
        fetched.append(lost or Experience(rollout, row.score, ref_logprobs))
    return fetched


async def write_down(run: Sampler, batch: Batch, *, policy_version: int) -> pa.Table:
    """Writes the batch into the journal, before anyone learns from it. Returns its table."""
    given_up = [void.sample_id for void in batch.voids if not void.asked_again]
    run.prompts.settle([row.rollout.prompt.sample_id for row in batch.experience] + given_up)
    run.prompts.give_back([void.sample_id for void in batch.voids if void.asked_again])
    # In a thread, because the event loop must serve rollouts while the disk syncs.
    return await asyncio.to_thread(_write_down, run, batch, policy_version, run.prompts.state())


def _write_down(run: Sampler, batch: Batch, policy_version: int, prompts: dict[str, Any]) -> pa.Table:
    table = experience_table(batch.experience, step=run.journal.next_step, decode=run.decode)
    run.journal.append(table, policy_version=policy_version, prompts=prompts, voids=batch.voids)
    return table
