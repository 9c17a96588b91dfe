"""vLLM behind the `Engine` protocol: the engine in this process, stepped by its own thread. Runs in each generator.

Everything that touches the engine runs on that thread between two steps. On a GPU one step may be in flight then: a
weight update first waits for it and takes its tokens. So weights never change during a step, and every token's weight
version is exact. The engine runs in the generator's process, which starts faster and needs less memory than vLLM's own
layouts. Only with tensor parallelism each device has its own process, which ends with this one.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from actors.generation.engine import Completion
from actors.generation.stop_texts import StopTexts
from actors.generation.vllm_settings import WHOLE_DISTRIBUTION, engine_args, sampling_settings, token_bounds
from common.config.actors import GeneratorsConfig, SamplingConfig
from common.errors import EngineDeadError
from common.metrics import meters
from common.model.files import load_tokenizer
from common.types import HANDED_OVER
from common.user_code.packages import package_root
from common.weights import Bucket

# isort: split
# vllm_settings must come first: it sets variables that vLLM reads while it is imported.
from vllm import SamplingParams
from vllm.v1.engine import FinishReason
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.request import RequestStatus

from actors.generation.vllm_weights import weights_of

T = TypeVar("T")

# An idle engine starts to step when no new request has arrived for this long, seconds. Requests that are sent together
# arrive one by one. If some missed the first step, the engine would need one more: 1.2 % of the time of 64 requests of
# 32 tokens.
GATHER_S = 0.005


class VLLMEngine:
    """vLLM as an `Engine`. The event loop of any thread may call it."""

    def __init__(
        self,
        model: Path,
        cfg: GeneratorsConfig,
        sampling: SamplingConfig,
        *,
        max_model_len: int,
        end_token_ids: list[int],
        trust_remote_code: bool = False,
        sleeps: bool = False,
        export_metrics: bool = False,
        caches_prefixes: bool = False,
    ) -> None:
        """Returns when vLLM has loaded the model; raises vLLM's error if that fails. With `sleeps`, `sleep` frees the
        GPU's memory. With `export_metrics` vLLM exports its own metrics through Ray, which works only in a Ray process.
        With `caches_prefixes` the engine keeps keys and values while the KV cache has room, and uses them for a prompt
        that begins with the same tokens as an earlier prompt or response under the same weights."""
        self._sampling = sampling_settings(sampling, end_token_ids)
        self._stop = StopTexts(load_tokenizer(model), sampling.stop) if sampling.stop else None
        self._args = engine_args(
            model,
            cfg,
            max_model_len=max_model_len,
            trust_remote_code=trust_remote_code,
            sleeps=sleeps,
            log_stats=export_metrics,
            caches_prefixes=caches_prefixes,
        )
        self._swaps = 0
        if caches_prefixes:
            for counted in ("prompt", "cached"):
                meters.count(f"ratchet_generator_{counted}_tokens_total", 0)
        self._load = (-1, -1)  # requests running and waiting, as reported last
        self._commands: deque[tuple[Callable[[], Any], Future]] = deque()
        self._wake = threading.Condition()
        self._waiting: dict[str, Future] = {}  # request key -> its final output
        self._keys = itertools.count()
        self._leaving = False
        self._asleep = False
        self._failure: BaseException | None = None
        self._stager = ThreadPoolExecutor(1, "vllm-weights")
        # Staging needs the interpreter lock for microseconds between long native calls. With Python's default of 5 ms
        # it would mostly wait for the engine's thread.
        sys.setswitchinterval(0.0005)
        if cfg.tensor_parallel > 1:
            # Worker processes start with this path: a user's own package `common` must not hide ours.
            sys.path.insert(0, package_root())
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="vllm-engine", daemon=True)
        self._thread.start()
        started.result()

    async def generate(
        self,
        prompt_ids: np.ndarray,
        *,
        seed: int,
        num_begun: int = 0,
        plain_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> Completion:
        key = str(next(self._keys))
        output: Future = Future()
        output.set_running_or_notify_cancel()  # without it, `set_result` fails if the caller was cancelled

        def add() -> None:
            changed = token_bounds(self._sampling, num_begun, max_tokens)
            if plain_tokens:
                changed = {**WHOLE_DISTRIBUTION, "max_tokens": plain_tokens}
            params = SamplingParams(**{**self._sampling, **changed}, seed=seed)
            context = prompt_ids.tolist()
            salt = {"cache_salt": self._salt} if self._args.enable_prefix_caching else {}
            self._engine.add_request(key, {"prompt_token_ids": context, **salt}, params)
            self._waiting[key] = output
            if self._stop is not None and params.stop:
                begins = len(context) - num_begun
                self._stop.prepare(self._state(key), context[:begins], context[begins:])
            if self._leaving:
                self._end([key])

        def abort() -> None:
            if self._waiting.pop(key, None):
                self._engine.abort_request([key])

        await self._call(add)
        try:
            answer = await asyncio.wrap_future(output)
        except asyncio.CancelledError:
            self._submit(abort)
            raise
        if self._args.enable_prefix_caching:
            meters.count("ratchet_generator_prompt_tokens_total", len(prompt_ids))
            meters.count("ratchet_generator_cached_tokens_total", answer.num_cached_tokens)
        final = answer.outputs[0]
        versions = np.full(len(final.token_ids), -1, dtype=np.int32)
        for span in final.weight_versions or ():
            versions[span.start : span.end] = int(span.version)
        return Completion(
            np.asarray(final.token_ids, dtype=np.int32),
            np.asarray(
                [at[t].logprob for t, at in zip(final.token_ids, final.logprobs, strict=True)], dtype=np.float32
            ),
            versions,
            HANDED_OVER if final.finish_reason == "abort" else final.finish_reason,
            answer.num_cached_tokens,
        )

    async def hand_over(self) -> None:
        def hand_over() -> None:
            self._leaving = True
            self._end(list(self._waiting))

        await self._call(hand_over)

    def _end(self, keys: list[str]) -> None:
        """Ends these requests with their partial responses, on the engine's thread. vLLM's own abort would lose them:
        it delivers partial responses only to a queue, and this engine has none."""
        for key in keys:
            final = self._state(key).make_request_output([], None, FinishReason.ABORT, None)
            self._engine.abort_request([key])
            self._waiting.pop(key).set_result(final)

    def _state(self, key: str) -> Any:
        """vLLM's output state of an unfinished request."""
        outputs = self._engine.output_processor
        [internal] = outputs.external_req_ids[key]
        return outputs.request_states[internal]

    async def sleep(self) -> None:
        def sleep() -> None:
            if not self._asleep:
                self._finish_steps()
                with _fatal("freeing its GPU memory"):
                    self._engine.sleep(level=1, mode="keep")
                self._asleep = True

        await self._call(sleep)

    async def wake(self) -> None:
        def wake() -> None:
            if self._asleep:
                with _fatal("allocating its GPU memory again"):
                    self._engine.wake_up()
                self._asleep = False

        await self._call(wake)

    async def stage(self, bucket: Bucket) -> None:
        await self._on_stager(partial(self._weights.stage, bucket))

    async def swap(self, version: int) -> float:
        def swap() -> tuple[list[Any], float]:
            self._finish_steps()
            started = time.perf_counter()
            try:
                old = self._weights.swap(version)
                self._engine.set_weight_version(str(version))
                if self._args.enable_prefix_caching:
                    self._forget_prefixes()
            finally:
                self._core.resume_scheduler()
            pause_s = time.perf_counter() - started
            meters.observe("ratchet_generator_swap_seconds", pause_s)
            return old, pause_s

        old, pause_s = await self._call(swap)
        await self._on_stager(old.clear)
        return pause_s

    @property
    def _salt(self) -> str:
        """Only requests with the same salt share keys and values. The salt counts swaps, because one version may be
        swapped in twice with different weights."""
        return str(self._swaps)

    def _forget_prefixes(self) -> None:
        """Hides the keys and values of earlier weights from later requests. A running request keeps the old salt, its
        keys and its values. A request that has not begun, or was preempted, gets the new salt: otherwise it would start
        from keys and values of the old weights."""
        self._swaps += 1
        for request in self._core.scheduler.requests.values():
            if request.status != RequestStatus.RUNNING:
                request.cache_salt = self._salt
                request.block_hashes.clear()
                request.update_block_hashes()

    async def _on_stager(self, function: Callable[[], T]) -> T:
        """Runs `function` on the thread that prepares weights while the engine steps."""
        return await asyncio.get_running_loop().run_in_executor(self._stager, function)

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._submit(function))

    def _submit(self, function: Callable[[], T]) -> Future[T]:
        """Runs `function` on the engine thread before its next step."""
        result: Future[T] = Future()
        with self._wake:
            if self._failure is not None:
                raise EngineDeadError("the engine failed earlier") from self._failure
            self._commands.append((function, result))
            self._wake.notify()
        return result

    def _run(self, started: Future[None]) -> None:
        try:
            stat_loggers = None if self._args.disable_log_stats else [_ray_stat_logger()]
            self._engine = LLMEngine.from_engine_args(self._args, stat_loggers=stat_loggers)
            if self._stop is not None:
                self._engine.output_processor.tokenizer = self._stop.tokenizer
            self._engine.set_weight_version("0")
            self._weights = weights_of(self._engine, Path(self._args.model))
            started.set_result(None)
        except BaseException as error:
            started.set_exception(error)
            return
        try:
            while True:
                self._run_commands()
                if self._has_work():
                    self._step()
                self._report_load()
        except BaseException as error:
            traceback.print_exc()  # into the actor's log; callers get only the message
            self._fail(error)
            self._engine.engine_core.shutdown()  # ends the worker processes

    def _has_work(self) -> bool:
        return not self._asleep and self._engine.has_unfinished_requests()

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished and (waiting := self._waiting.pop(output.request_id, None)):
                waiting.set_result(output)

    def _finish_steps(self) -> None:
        """Pauses the scheduler and takes the tokens of all steps in flight, which the current weights sampled. Requests
        keep their place. With asynchronous scheduling vLLM starts a step before it takes the tokens of the last one, so
        that the GPU never waits for Python."""
        with _fatal("the step in flight"):
            self._core.pause_scheduler("keep", clear_cache=False)
            while self._core.batch_queue:
                self._step()

    @property
    def _core(self) -> Any:
        return self._engine.engine_core.engine_core

    def _report_load(self) -> None:
        load = self._core.scheduler.get_request_counts()
        if load != self._load:
            self._load = load
            for state, requests in zip(("running", "waiting"), load, strict=True):
                meters.gauge("ratchet_generator_requests", requests, state=state)

    def _run_commands(self) -> None:
        with self._wake:
            while not (self._commands or self._has_work()):
                self._wake.wait()
                while self._wake.wait(GATHER_S):  # wait for more requests: a step for many takes as long as for one
                    pass
        while self._commands:  # popped one by one: if one is fatal, `_fail` still finds the others in the queue
            function, result = self._commands.popleft()
            if not result.set_running_or_notify_cancel():
                continue
            try:
                result.set_result(function())
            except EngineDeadError as error:
                result.set_exception(error)
                raise
            except Exception as error:
                if not getattr(self._core.model_executor, "is_failed", False):
                    result.set_exception(error)  # the caller's mistake, such as a prompt longer than the context
                    continue
                dead = EngineDeadError(f"one of its processes is gone: {error}")
                result.set_exception(dead)
                raise dead from error

    def _fail(self, error: BaseException) -> None:
        """Raises the error in every waiting caller, and in every later one."""
        with self._wake:
            self._failure = error
            pending = [result for _, result in self._commands] + list(self._waiting.values())
        for result in pending:
            if not result.done():
                result.set_exception(EngineDeadError(f"the engine failed: {type(error).__name__}: {error}"))


@contextmanager
def _fatal(what: str) -> Iterator[None]:
    """Turns an error of the block into an EngineDeadError, because the engine's state is unknown after it. The replica
    is then replaced."""
    try:
        yield
    except Exception as error:
        raise EngineDeadError(f"{what} failed: {error}") from error


def _ray_stat_logger() -> Any:
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger  # imports Ray, which nothing else here needs

    return RayPrometheusStatLogger
