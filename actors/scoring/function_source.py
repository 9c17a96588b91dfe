"""A Python function as a reward source. Runs in each reward replica."""

from __future__ import annotations

from collections.abc import Sequence

from actors.scoring.call_queue import CallQueue, Waiting
from actors.scoring.function_processes import ProcessRunner
from actors.scoring.function_runner import Runner
from actors.scoring.function_threads import ThreadRunner
from common.config.actors import SourcesConfig
from common.config.sources import FunctionSourceConfig
from common.errors import UserError
from common.futures import settle
from common.reward_input import RewardInput
from common.types import RawScore
from common.user_code.calls import call_style, find_function
from common.user_code.errors import UserCodeError
from common.user_code.functions import explain_import
from common.user_code.results import Outcome, Result


class FunctionSource:
    """A function that takes a list gets all waiting answers in one call, up to `batch`. Any other function gets one
    answer per call.

    Calls run one at a time, or one in each worker process. Calls of an async function overlap, up to `concurrency`. No
    call blocks the event loop, so other sources work meanwhile.
    """

    def __init__(self, cfg: FunctionSourceConfig, service: SourcesConfig) -> None:
        self._origin = cfg.function
        self._runner = make_runner(cfg, service)
        style = self._runner.style
        workers = service.workers if service.isolation == "process" else 1
        self._queue: CallQueue[Result] = CallQueue(
            self._serve,
            batch=cfg.batch if style.takes_list else 1,
            concurrency=cfg.concurrency if style.is_async else workers,
        )

    async def __call__(self, answer: RewardInput) -> RawScore:
        """The function's score. Raises UserCodeError."""
        score, figures = await self._queue.submit(answer)
        return RawScore(score, self._origin, figures)

    def close(self) -> None:
        """Ends its threads or worker processes."""
        self._runner.close()

    async def _serve(self, waiting: Sequence[Waiting[Result]]) -> None:
        """Makes one call. If a call with several answers fails, each is tried alone: a bad answer must not void the
        others."""
        outcomes: Sequence[Outcome | Exception]
        try:
            outcomes = await self._runner.run([answer for answer, _ in waiting])
        except UserCodeError as error:
            if len(waiting) > 1:
                for answer, future in waiting:
                    if not future.done():
                        await self._serve([(answer, future)])
                return
            outcomes = [error]
        except Exception as error:  # an error of Ratchet's own: every caller must get it
            outcomes = [error] * len(waiting)
        settle(waiting, outcomes)


def make_runner(cfg: FunctionSourceConfig, service: SourcesConfig) -> Runner:
    """Raises UserError for a function that cannot be imported, or cannot be called with a RewardInput."""
    in_process = service.isolation == "process"
    try:
        if in_process:
            return ProcessRunner(cfg.function, takes=cfg.takes, limit_s=service.call_limit_s, workers=service.workers)
        function = find_function(cfg.function)
        return ThreadRunner(function, call_style(function, cfg.takes), limit_s=service.call_limit_s)
    except UserCodeError as error:
        setting = f"reward source {cfg.name}"
        raise UserError(explain_import(cfg.function, setting, error, users_first=in_process)) from None
