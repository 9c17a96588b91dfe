"""A Python function as a reward source: one answer or several a call, each call within a limit. Runs in each reward
process."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from actors.scoring.function_processes import ProcessRunner
from actors.scoring.function_threads import Runner, ThreadRunner
from common.config.actors import SourcesConfig
from common.config.sources import FunctionSourceConfig
from common.errors import UserError
from common.model.batcher import settle
from common.reward_input import RewardInput
from common.types import Raw
from common.user_code.calls import UserCodeError, find_function, form_of
from common.user_code.functions import explain_import

Result = tuple[float, dict[str, float]]  # score and figures of one answer


class FunctionSource:
    """Calls come one at a time, of an async function up to `concurrency` at a time, so that models and services work on
    meanwhile. A function that takes a list is given all answers that wait, up to `batch`."""

    def __init__(self, cfg: FunctionSourceConfig, service: SourcesConfig) -> None:
        self._origin = cfg.function
        self._runner = make_runner(cfg, service)
        form = self._runner.form
        self._most = cfg.concurrency if form.is_async else service.workers if service.isolation == "process" else 1
        self._batch = cfg.batch if form.takes_list else 1
        self._waiting: deque[tuple[RewardInput, asyncio.Future[Result]]] = deque()
        self._callers: set[asyncio.Task[None]] = set()  # those that will look at what waits once more

    async def __call__(self, answer: RewardInput) -> Raw:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((answer, future))
        if len(self._callers) < self._most:
            caller = asyncio.create_task(self._call_while_any_waits())
            self._callers.add(caller)
        score, figures = await future
        return Raw(score, self._origin, figures)

    def close(self) -> None:
        self._runner.close()

    async def _call_while_any_waits(self) -> None:
        """Ends when nothing waits. From then on `__call__` begins another one: it must see that without delay, so the
        task takes itself off the list."""
        while self._waiting:
            count = min(self._batch, len(self._waiting))
            await self._serve([self._waiting.popleft() for _ in range(count)])
        task = asyncio.current_task()
        assert task is not None
        self._callers.remove(task)

    async def _serve(self, taken: Sequence[tuple[RewardInput, asyncio.Future[Result]]]) -> None:
        """One call. When a call with several answers fails, each is tried alone: one bad answer costs no other."""
        wanted = [(answer, future) for answer, future in taken if not future.done()]  # or their caller has given up
        if not wanted:
            return
        outcomes: Sequence[Result | Exception]
        try:
            outcomes = await self._runner.run([answer for answer, _ in wanted])
        except UserCodeError as error:
            if len(wanted) > 1:
                for one in wanted:
                    await self._serve([one])
                return
            outcomes = [error]
        except Exception as error:  # a fault of ours: every caller must hear of it
            outcomes = [error] * len(wanted)
        settle(wanted, outcomes)


def make_runner(cfg: FunctionSourceConfig, service: SourcesConfig) -> Runner:
    """Raises UserError for a function that cannot be had, or called with a RewardInput."""
    in_process = service.isolation == "process"
    try:
        if in_process:
            return ProcessRunner(cfg.function, takes=cfg.takes, limit_s=service.call_limit_s, workers=service.workers)
        function = find_function(cfg.function)
        return ThreadRunner(function, form_of(function, cfg.takes), limit_s=service.call_limit_s)
    except UserCodeError as error:
        setting = f"reward source {cfg.name}"
        raise UserError(explain_import(cfg.function, setting, error, ours_last=in_process)) from None
