"""Imports a reward function and calls it once before anything starts. Runs in the driver.

A worker process does both, so nothing of the user's module stays in the driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from tempfile import TemporaryFile
from typing import IO

from actors.scoring.function_processes import ended_its_process
from actors.scoring.worker_process import Worker, WorkerDiedError
from common.config.actors import SourcesConfig
from common.config.sources import FunctionSourceConfig
from common.errors import UserError
from common.model.identity import file_digest
from common.plain_text import one_line
from common.reward_input import RewardInput
from common.user_code.errors import UserCodeError
from common.user_code.functions import explain_import
from common.user_code.import_path import module_file
from common.user_code.results import Outcome

TRY_S = 30.0  # time limit of the trial call, seconds


def check_import(cfg: FunctionSourceConfig, service: SourcesConfig) -> None:
    """Raises UserError for a function that cannot be imported, or whose signature does not fit."""
    with TemporaryFile() as output, _worker(cfg, service, output):
        pass


def try_function(cfg: FunctionSourceConfig, service: SourcesConfig, answer: RewardInput) -> str:
    """Raises UserError for a function that cannot be imported or called, or whose result can never be a score. Returns
    a warning if the call fails, takes too long or gives no finite number, because other answers may succeed; else
    ""."""
    remedy = "; return the score as a number, or a dict with it"
    with TemporaryFile() as output, _worker(cfg, service, output) as worker:
        try:
            [outcome] = asyncio.run(_call(worker, answer))
        except UserCodeError as error:
            outcome = error
            attributes = ", ".join(field.name for field in fields(answer))
            remedy = f"; it has {attributes}" if error.details else ""  # permanent only for a wrong attribute
        except WorkerDiedError as died:
            reason = ended_its_process(died).reason + _last_line(output)
            outcome = UserCodeError(reason, permanent=service.isolation == "thread")
            remedy = (
                '; fix it, or set reward.isolation = "process" (labeller.isolation for a labeller), where that costs '
                "one rollout"
            )
    if not isinstance(outcome, UserCodeError):
        return ""
    fault = (
        f"reward source {cfg.name} ({cfg.function}), tried on the first prompt with a made-up response, "
        f"{one_line(outcome.reason)}"
    )
    if outcome.permanent:
        raise UserError(fault + remedy)
    return f"{fault}; every response on which it fails like this gets no score"


def function_digest(cfg: FunctionSourceConfig) -> str | None:
    """SHA-256 of the file with the function. Modules that it imports are not looked at. None if there is no file."""
    file = module_file(cfg.function.partition(":")[0])
    return file_digest(file) if file is not None else None


@contextmanager
def _worker(cfg: FunctionSourceConfig, service: SourcesConfig, output: IO[bytes]) -> Iterator[Worker]:
    """A worker process that has imported the function, with the same search order of modules as in the run."""
    own_process = service.isolation == "process"
    try:
        worker = Worker(
            cfg.function,
            takes=cfg.takes,
            limit_s=min(service.call_limit_s, TRY_S),
            ratchet_first=not own_process,
            output=output,
        )
    except UserCodeError as error:
        message = explain_import(cfg.function, f"reward source {cfg.name}", error, users_first=own_process)
        raise UserError(message + _last_line(output)) from None
    try:
        yield worker
    finally:
        worker.kill()


async def _call(worker: Worker, answer: RewardInput) -> list[Outcome]:
    try:
        return await worker.call([answer])
    finally:
        worker.kill()  # inside the event loop that its connection belongs to


def _last_line(output: IO[bytes]) -> str:
    """The last line that the function's process printed."""
    output.seek(0)
    lines = output.read()[-10_000:].decode(errors="replace").strip().splitlines()
    return f" (the last line it printed: {one_line(lines[-1], 200)})" if lines else ""
