"""Which object plays an episode, by the kind of environment. Runs in each environment replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actors.environments.loading import find_environment
from common.config.environment import EnvironmentConfig
from common.errors import UserError
from common.user_code.errors import UserCodeError
from common.user_code.functions import explain_import

Make = Callable[[], Any]  # makes the object of one episode: anything with the methods of common/environment.py


def make_episode(cfg: EnvironmentConfig) -> Make:
    """Raises UserError for a class that cannot be used."""
    if cfg.function is None:
        raise UserError(f"environment: no code here plays episodes of {cfg.name}")
    try:
        return find_environment(cfg.function)
    except UserCodeError as error:
        raise UserError(explain_import(cfg.function, "environment.function", error)) from None
