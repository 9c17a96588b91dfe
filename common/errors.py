"""Errors that cross processes or folders, and the reason of a process's death in one line. Runs anywhere."""

from __future__ import annotations

import re


class UserError(Exception):
    """Something the user can fix. The message states rule, value and remedy; the command line exits with 2."""


class RolloutLostError(RuntimeError):
    """A rollout was lost with the machine that held its tokens; it must be generated again."""


class RoleError(RuntimeError):
    """A role cannot do its work any more; the message names role, replica and request."""


class RankLostError(RoleError):
    """A rank of the learner died or does not answer. The group can be rebuilt from checkpoint and journal."""


class BatchError(ValueError):
    """A batch cannot be learned from: its numbers are not finite. The message says which. The weights may have changed
    in earlier minibatches of the batch, so the learner's state must be restored."""


class BrokenWeightsError(BatchError):
    """The weights were broken before this batch: an earlier batch broke them."""


class GivenUpError(RuntimeError):
    """A request has no answer, because of the request itself: several processes died while running it, or the
    environment of an episode failed."""

    def __init__(self, message: str, *, role: str = "", kind: str = "") -> None:
        """`role`: the role of the processes that died. `kind`: see `common.types.Void`."""
        super().__init__(message)
        self.role, self.kind = role, kind


class CorruptWeightsError(RuntimeError):
    """A new set of weights is damaged or incomplete. It is refused, and the old set stays in use."""


class EngineDeadError(RuntimeError):
    """The engine failed and will not answer again; its replica must be replaced."""


def death_reason(error: BaseException | None) -> str:
    """Why a process died, in one line. Ray's messages are paragraphs whose last line may say nothing."""
    text = str(error)
    if "its worker process has died" in text:
        pid, code = re.search(r"\bpid: (\d+)", text), re.search(r"exit code (\d+)", text)
        how = f"ended with exit code {code[1]}" if code else "was killed by a signal, ran out of memory, or crashed"
        return f"its process{f' {pid[1]}' if pid else ''} {how}"
    lines = [line for line in text.splitlines() if line.strip() and "unexpected internal error" not in line]
    return lines[-1].strip() if lines else type(error).__name__
