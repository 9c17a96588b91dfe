"""Answers to callers that wait in a queue. Runs anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


def settle(requests: Sequence[tuple[Any, asyncio.Future[Result]]], outcomes: Sequence[Result | Exception]) -> None:
    """Gives each waiting caller its result, or raises its error there."""
    for (_, future), outcome in zip(requests, outcomes, strict=True):
        if future.done():
            continue  # its caller was cancelled
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
