"""Calls a method of the user's object, where any exception becomes a UserCodeError. Runs anywhere. Imports only the
standard library."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from .calls import is_cancelled_from_outside
from .errors import UserCodeError, error_of


def call_plain(function: Callable[..., Any], *args: Any) -> Any:
    """Returns the function's result, which may be an awaitable. Raises UserCodeError, also for `sys.exit()`."""
    try:
        return function(*args)
    except UserCodeError:  # from Ratchet's own environment, which reports a failure of the user's code
        raise
    except BaseException as error:
        raise error_of(error) from error


async def call_awaited(function: Callable[..., Any], *args: Any) -> Any:
    """Like `call_plain`, with the result awaited if that is needed. Raises CancelledError if the caller cancels it."""
    task = asyncio.current_task()
    try:
        result = function(*args)
        return await result if inspect.isawaitable(result) else result
    except UserCodeError:
        raise
    except BaseException as error:
        if is_cancelled_from_outside(error, task):
            raise
        raise error_of(error) from error
