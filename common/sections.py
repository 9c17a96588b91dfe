"""What every tree of settings is built from: the section, the bounds of its numbers, and the error for bad input."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class UserError(Exception):
    """Something the user can mend. The message states rule, value and remedy; the command line exits with 2."""


Positive = Annotated[int, Field(ge=1)]
MOST_PROCESSES = 10_000  # of one role; each is listed when a run is placed
Processes = Annotated[int, Field(ge=1, le=MOST_PROCESSES)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
