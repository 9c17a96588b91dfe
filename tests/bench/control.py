"""The control plane alone: how many rollouts pass from prompt to journal in a second, and what each costs when there
are many replicas or many outstanding prompts.

Engines, scorer and reference answer at once. Loop, pools, routing, generators, buffer and journal are the real ones,
all in one process. Learning and publication are left out. The compared settings take turns of a fifth of a second, so
that they meet the same state of the machine. This also writes runs/bench-control.json and a plot; `make bench-control`
runs it alone.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa

import actors.pool.membership as membership
from actors.generation.engine import Completion
from actors.generation.generator import Generator
from actors.pool.pool import Pool
from actors.pool.roles import GeneratorPool, ReferencePool, RewardPool
from common.config.base import Replicated
from common.config.ppo import Config
from common.types import Prompt, Rollout, RolloutRef, Score
from deploy.session import rare_full_collections
from learner.loop.prompts import PromptRecord, PromptStream
from learner.loop.run import Run
from learner.loop.train_loop import train
from tests.bench.results import Result
from tests.fakes import LocalHost, make_rollout, tiny_config

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROMPT_TOKENS, NEW_TOKENS = 32, 64
BATCH = 50
WARM_UP = 4
TURN, TURNS = 20, 60  # steps at a time in each process; times
ROUNDS = 3
REPLICAS = (1, 10, 100, 1000)
OUTSTANDING = (100, 1000, 10_000, 100_000)
FREE_BATCH, FREE_STEPS = 500, 30


class StubLearner:
    """Learns nothing; its steps are counted."""

    def __init__(self) -> None:
        self.step = 0

    async def update(self, table: pa.Table) -> dict[str, float]:
        self.step += 1
        return {"mismatch/kl": 0.0}

    async def policy_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        return [rollout.rollout_logprobs for rollout in rollouts]

    async def publish(self) -> AsyncGenerator[Any, None]:
        return
        yield

    async def unless_lost(self, work: Awaitable[Any]) -> Any:
        return await work


class StubEngine:
    """Writes the same tokens under the learner's version, at once."""

    _logprobs = np.full(NEW_TOKENS, -1.0, dtype=np.float32)

    def __init__(self, learner: StubLearner) -> None:
        self._learner = learner

    async def generate(
        self,
        prompt_ids: np.ndarray,
        *,
        seed: int,
        num_begun: int = 0,
        plain_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> Completion:
        versions = np.full(NEW_TOKENS, self._learner.step, dtype=np.int32)
        return Completion(np.arange(NEW_TOKENS, dtype=np.int32), self._logprobs.copy(), versions, "length")


class InstantHost(LocalHost):
    """Calls its replicas' methods on the spot, or, with a gate, once as many as were let through before."""

    def __init__(self, role: Any, *args: Any, gated: bool = False) -> None:
        super().__init__(role, *args)
        self.permits = 0.0 if gated else float("inf")
        self.held: deque[Callable[[], None]] = deque()

    async def create(self, name: str) -> Any:
        handle = InstantHandle(self, name, self._make(name, *self._args))
        self.handles.append(handle)
        return handle

    def kill(self, handle: Any, *, close: bool) -> Future[None]:
        killed: Future[None] = Future()
        killed.set_result(None)
        return killed

    async def node(self, handle: Any) -> str:
        return "here"

    def let_through(self, number: int) -> None:
        self.permits += number
        while self.permits >= 1 and self.held:
            self.permits -= 1
            self.held.popleft()()

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        return [reference.result() for reference in references]


class InstantHandle:
    def __init__(self, host: InstantHost, name: str, role: Any) -> None:
        self.name = name
        for method in ("ready", "generate", "score", "logprobs"):
            if hasattr(role, method):
                setattr(self, method, InstantMethod(host, getattr(role, method), gated=method == "generate"))


class InstantMethod:
    def __init__(self, host: InstantHost, method: Callable, *, gated: bool, num_returns: int = 1) -> None:
        self._host, self._method, self._gated, self._num_returns = host, method, gated, num_returns

    def options(self, *, num_returns: int) -> InstantMethod:
        return InstantMethod(self._host, self._method, gated=self._gated, num_returns=num_returns)

    def remote(self, *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        answers = [loop.create_future() for _ in range(self._num_returns)]

        def run() -> None:
            given = [arg.result() if isinstance(arg, asyncio.Future) else arg for arg in args]
            try:
                self._method(*given).send(None)
            except StopIteration as returned:
                values = [returned.value] if self._num_returns == 1 else returned.value
                for answer, value in zip(answers, values, strict=True):
                    answer.set_result(value)

        if not self._gated:
            run()
        else:
            self._host.held.append(run)
            self._host.let_through(0)
        return answers[0] if self._num_returns == 1 else answers


class StubReward:
    def __init__(self, name: str) -> None:
        self._name = name

    async def ready(self) -> str:
        return self._name

    async def score(self, rollout: Rollout) -> Score:
        return Score(1.0, {"stub": 1.0}, {"stub": "stub"})


class StubReference(StubReward):
    async def logprobs(self, rollout: Rollout) -> tuple[np.ndarray, bool]:
        return rollout.rollout_logprobs.copy(), True


class SameWeights(GeneratorPool):
    async def load(self, weights: AsyncGenerator[Any, None], version: int) -> dict[str, float]:
        """Nothing is published."""
        return {}

    async def generate(self, prompt: Prompt, *, plain_tokens: int = 0) -> RolloutRef:
        if not plain_tokens:
            return await super().generate(prompt)
        # The comparison of engines and learner before training, which is not measured.
        rollout = make_rollout(prompt, [1])
        reference = asyncio.get_running_loop().create_future()
        reference.set_result(rollout)
        return replace(RolloutRef.of(rollout), rollout=reference)


class Measured(Exception):
    """Enough steps."""


async def steps(
    directory: Path, *, batch: int, outstanding: int, replicas: int, in_step: bool, after_step: Callable[[], None]
) -> None:
    """Steps until `after_step` raises Measured. `in_step`: the engines write one batch for each consumed one, so that
    the number of waiting rollouts stays the same."""
    cfg: Config = tiny_config(
        "none",
        num_steps=10**9,
        rollouts_per_step=batch,
        max_staleness=outstanding // batch - 1,
        buffer_mib=10**6,
        sampling={"max_new_tokens": NEW_TOKENS},
        prompts={"max_tokens": PROMPT_TOKENS},
        ppo={"minibatches": 1},
        evaluation={"prompts": 0},
        checkpoint={"every": 10**9},
        credit={"every": 0},
    )
    record = PromptRecord("a question", np.arange(PROMPT_TOKENS, dtype=np.int32), {"answer": 1})
    learner = StubLearner()
    quiet = {"probe_timeout_s": 1e6}  # probes cost by the second, not by the rollout
    host = InstantHost(Generator, 0, lambda: StubEngine(learner), gated=in_step)
    generators = SameWeights(host, Replicated(min=replicas, **quiet))
    rewards, references = (Pool(InstantHost(role), Replicated(**quiet)) for role in (StubReward, StubReference))
    pools = (generators.pool, rewards, references)
    for pool in pools:
        await pool.start(timeout_s=600)
    host.let_through(batch)

    def on_step(*_: Any) -> None:
        after_step()
        if in_step:
            host.let_through(batch)

    run = Run(
        cfg=cfg,
        directory=directory,
        prompts=PromptStream([record] * 1000, seed=0, rollouts_per_prompt=1),
        heldout=[],
        generators=generators,
        reward=RewardPool(rewards),
        reference=ReferencePool(references),
        learner=learner,
        on_step=on_step,
    )
    try:
        await train(run)
    except Measured:
        pass
    finally:
        for pool in pools:
            pool.stop()


def run_steps(**settings: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as directory, rare_full_collections():
        asyncio.run(steps(Path(directory), **settings))


def rollouts_per_s() -> float:
    marks: list[float] = []

    def mark() -> None:
        marks.append(time.perf_counter())
        if len(marks) > WARM_UP + FREE_STEPS:
            raise Measured

    run_steps(batch=FREE_BATCH, outstanding=2 * FREE_BATCH, replicas=4, in_step=False, after_step=mark)
    return FREE_BATCH * FREE_STEPS / (marks[-1] - marks[WARM_UP])


def take_turns(orders: Connection, settings: dict[str, int]) -> None:
    """In a process of its own: for each order a turn of steps, answered with its CPU seconds; at the end with those of
    a full garbage collection."""
    membership.MAX_PENDING = max(REPLICAS)  # all of them at once: starting is not what is measured
    done, began = 0, 0.0

    def after_step() -> None:
        nonlocal done, began
        done += 1
        if done < WARM_UP or (done - WARM_UP) % TURN:
            return
        orders.send(time.process_time() - began)
        if not orders.recv():
            began = time.process_time()
            gc.collect()
            orders.send(time.process_time() - began)
            raise Measured
        began = time.process_time()

    run_steps(batch=BATCH, in_step=True, after_step=after_step, **settings)


def costs(settings: Sequence[dict[str, int]]) -> tuple[list[float], list[float]]:
    """CPU time under each of these settings: of a rollout in microseconds, and of a full garbage collection in seconds,
    which hardly happens during a measurement. The settings take short turns, so that they meet the same machine."""
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    for chosen in settings:
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=take_turns, args=(theirs, chosen), daemon=True))
        processes[-1].start()
        theirs.close()
        ours.recv()  # its pipe is full
        pipes.append(ours)
    seconds = np.zeros(len(settings))
    for _ in range(TURNS):
        for i, pipe in enumerate(pipes):
            pipe.send(True)
            seconds[i] += pipe.recv()
    collections = []
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        collections.append(pipe.recv())
        process.join()
    return [float(1e6 * total / (TURNS * TURN * BATCH)) for total in seconds], collections


def measure() -> dict[str, Result]:
    rate = statistics.median(rollouts_per_s() for _ in range(ROUNDS))
    replicas_us, _ = costs([{"replicas": number, "outstanding": 1000} for number in REPLICAS])
    outstanding_us, collections_s = costs([{"replicas": 4, "outstanding": number} for number in OUTSTANDING])
    ratios = {
        "rollouts_per_s": rate,
        "cost_ratio_1000_replicas": replicas_us[-1] / replicas_us[0],
        "cost_ratio_100k_outstanding": outstanding_us[-1] / outstanding_us[0],
    }
    parts = {
        **{f"us_per_rollout_{n}_replicas": us for n, us in zip(REPLICAS, replicas_us, strict=True)},
        **{f"us_per_rollout_{n}_outstanding": us for n, us in zip(OUTSTANDING, outstanding_us, strict=True)},
        "full_collection_s_100000_outstanding": collections_s[-1],
    }
    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    (folder / "bench-control.json").write_text(json.dumps({**ratios, **parts}, indent=2) + "\n", encoding="utf-8")
    plot(
        folder / "bench-control.png",
        {"replicas": (REPLICAS, replicas_us), "outstanding": (OUTSTANDING, outstanding_us)},
    )
    return {
        "rollouts_per_s": Result(rate, ">= 5000"),
        "cost_ratio_1000_replicas": Result(
            ratios["cost_ratio_1000_replicas"], "<= 1.2", {k: v for k, v in parts.items() if k.endswith("replicas")}
        ),
        "cost_ratio_100k_outstanding": Result(
            ratios["cost_ratio_100k_outstanding"], "<= 1.2", {k: v for k, v in parts.items() if k.endswith("ing")}
        ),
    }


def plot(path: Path, curves: dict[str, tuple[tuple[int, ...], list[float]]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, (name, (counts, microseconds)) in zip(axes, curves.items(), strict=True):
        axis.semilogx(counts, microseconds, "o-")
        axis.set_xlabel({"replicas": "generator replicas", "outstanding": "prompts outstanding"}[name])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CPU time of one rollout, µs")
    figure.savefig(path, dpi=120)
    plt.close(figure)
