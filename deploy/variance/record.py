"""The file that `ratchet evaluate --variance` writes, and how to read it. Runs anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RECORD = "variance.json"


def advantages_used(account: Mapping[str, Any]) -> str:
    """Which advantages the run itself uses for its gradient: "whitened" or "unwhitened" (ppo.whiten_advantages)."""
    return "whitened" if account["whitens"] else "unwhitened"
