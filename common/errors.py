"""Errors that cross processes or folders. Runs anywhere."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The message states rule, value and remedy; the command line exits with 2."""


class RolloutLostError(RuntimeError):
    """What was written is gone, with the machine it lay on; its prompt must be asked again."""


class RoleError(RuntimeError):
    """A role cannot do its work any more; the message names role, replica and what was asked."""


class GivenUpError(RuntimeError):
    """So many processes died over one request that it seems to be the cause."""


class CorruptWeightsError(RuntimeError):
    """A new set of weights is not what was published, or not all of it: it is refused, and the old one goes on."""


class EngineDeadError(RuntimeError):
    """The engine failed and will not answer again; its replica must be replaced."""
