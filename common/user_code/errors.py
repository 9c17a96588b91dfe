"""One exception for every failure of the user's code, `sys.exit()` included. Runs anywhere. Imports only the standard
library."""

from __future__ import annotations

import functools
import os
import traceback
from types import TracebackType
from typing import Any

TRACEBACK_CHARS = 20_000
_HERE = os.path.dirname(__file__)


class UserCodeError(Exception):
    """The user's code cannot be used, or failed on an answer.

    `reason` is one line. `details` is the traceback, if there is one. `fault` is the same text for every answer that
    fails in the same way, so that failures can be counted. `permanent`: it would fail in this way on every answer.
    `missing` names the module that was not found, which may be one that the user's module imports. `kind`: how an
    environment failed, one of `common.environment.VOID_KINDS`.
    """

    def __init__(
        self,
        reason: str,
        *,
        details: str = "",
        fault: str = "",
        permanent: bool = True,
        missing: str = "",
        kind: str = "wrong_answer",
    ) -> None:
        super().__init__(reason)
        self.reason, self.details, self.fault = reason, details, fault or reason
        self.permanent, self.missing, self.kind = permanent, missing, kind

    def after(self, what: str) -> dict[str, Any]:
        """The arguments of the same error whose text begins with `what`: "step" gives "step raised ..."."""
        texts = {"reason": f"{what} {self.reason}", "fault": f"{what} {self.fault}"}
        return {**texts, "details": self.details, "permanent": self.permanent, "kind": self.kind}

    def __reduce__(self) -> Any:
        return functools.partial(UserCodeError, **vars(self)), ()


def error_of(raised: BaseException) -> UserCodeError:
    """The error for an exception that a function raised, with its file and line."""
    frames = traceback.extract_tb(_from_users_code(raised.__traceback__))
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    kind = type(raised).__name__
    message = f": {str(raised)[:2000]}" if _has_text(raised) else ""
    return UserCodeError(
        f"raised {kind}{message}{where}",
        details=traceback_text(raised),
        fault=f"raised {kind}{where}",
        permanent=isinstance(raised, AttributeError) and type(raised.obj).__name__ == "RewardInput",
        kind="raised",
    )


def error_text(error: BaseException) -> str:
    """The type of an exception, and its text if it has one that can be made."""
    kind = type(error).__name__
    return f"{kind}: {error}" if _has_text(error) else kind


def _has_text(error: BaseException) -> bool:
    try:
        return bool(str(error))
    except Exception:
        return False


def traceback_text(error: BaseException) -> str:
    """The traceback, beginning with the user's own code. A very long one loses its beginning."""
    lines = traceback.format_exception(type(error), error, _from_users_code(error.__traceback__))
    return "".join(lines)[-TRACEBACK_CHARS:]


def _from_users_code(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and os.path.dirname(trace.tb_frame.f_code.co_filename) == _HERE:
        trace = trace.tb_next
    return trace
