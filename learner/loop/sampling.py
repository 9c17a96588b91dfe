"""A journal of a policy that never learns: its answers to the first prompts of the stream. Runs in the driver.

The prompts, pools, buffer and journal are those of `ratchet train` (learner/loop/train_loop.py). Every batch is in the
journal before the next one is taken, so a killed sampling continues where it stopped. The weights stay those of version
0, and the policy is its own reference: `ref_logprobs` are null in every step, which means a KL of 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.config.ppo import Config
from common.experience_table import Decode
from common.futures import unless_failed
from common.types import RolloutRef, Void
from learner.loop.buffer import RolloutBuffer
from learner.loop.journal import Journal
from learner.loop.prompts import PromptStream
from learner.loop.roles import Generators, Reference, Reward
from learner.loop.train_loop import fetch, produce, write_down

VERSION = 0  # of the weights, in every step


class PolicyIsReference:
    """`learner.loop.roles.Reference` of a policy that does not move."""

    async def logprobs(self, ref: RolloutRef) -> tuple[Any, bool]:
        return None, True


@dataclass
class Sampling:
    """The parts that sample a journal (`learner.loop.run.Sampler`)."""

    cfg: Config
    directory: Path
    prompts: PromptStream
    generators: Generators
    reward: Reward
    decode: Decode | None = None
    on_batch: Callable[[int, pa.Table, list[Void]], None] = lambda done, table, voids: None
    reference: Reference = field(default_factory=PolicyIsReference)
    newest_text: float = 0.0
    finished: Callable[[], int] = lambda: 0  # responses that are written and scored, for the screen
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(self.directory / "journal")


def num_responses(journal: Journal) -> int:
    """Responses in all steps of a journal."""
    return sum(step.table.num_rows for step in journal.since(0))


async def sample(run: Sampling, responses: int) -> None:
    """Brings the journal to this many responses, in batches of `rollouts_per_step`; the last one may be smaller.

    Waits for the oldest responses of the buffer, which `produce` has generated and scored. The next batch is generated
    at the same time, because no response can be stale here.
    """
    cfg = run.cfg
    run.journal.open_for_writing()
    done = num_responses(run.journal)
    if (last := run.journal.last()) is not None:
        run.prompts.restore(last.prompts)
    buffer = RolloutBuffer(
        cfg.rollouts_per_step,
        max_staleness=1,
        fetch=partial(fetch, run.generators),
        wanted=responses - done,
        max_void_share=cfg.reward.max_void_share,
        max_bytes=cfg.buffer_mib << 20,
        rollout_bytes=cfg.longest_rollout_bytes,
    )
    producer = asyncio.create_task(produce(run, buffer))
    try:
        while done < responses:
            count = min(cfg.rollouts_per_step, responses - done)
            run.finished = partial(_num_finished, buffer, done, count)
            batch = await unless_failed(buffer.take(count, policy_version=VERSION), producer)
            table = await write_down(run, batch, policy_version=VERSION)
            await buffer.release(count)
            done += table.num_rows
            run.on_batch(done, table, batch.voids)
    finally:
        producer.cancel()
        await asyncio.gather(producer, return_exceptions=True)


def _num_finished(buffer: RolloutBuffer, done: int, count: int) -> int:
    return done + buffer.num_finished(count)
