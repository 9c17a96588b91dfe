"""Which model directories may run Python code of their own in this process: none, unless the config says so.

Runs wherever a model or its tokenizer is loaded.
"""

from __future__ import annotations

from pathlib import Path

_allowed: set[Path] = set()


def allow(directory: Path) -> None:
    """`model.trust_remote_code` is set for this directory."""
    _allowed.add(directory.resolve())


def trusted(directory: Path) -> bool:
    """What transformers gets as trust_remote_code. It is never left out: transformers would ask on the terminal."""
    return directory.resolve() in _allowed
