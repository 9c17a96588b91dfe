"""The file that `ratchet evaluate --variance` writes, and how to read it. Runs anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RECORD = "variance.json"


def advantages_used(account: Mapping[str, Any]) -> str:
    """Which gradients of each estimator are those of the run: of "whitened" or of "unwhitened" advantages
    (ppo.whiten_advantages)."""
    return "whitened" if account["whitens"] else "unwhitened"
