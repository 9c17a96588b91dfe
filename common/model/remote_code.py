"""Records which model directories may run their own Python code in this process: only those the config allows.

Runs anywhere. Every process that loads a model or a tokenizer has its own record.
"""

from __future__ import annotations

from pathlib import Path

_allowed: set[Path] = set()


def allow(directory: Path) -> None:
    """Allows code from this directory: its `trust_remote_code` is set."""
    _allowed.add(directory.resolve())


def trusted(directory: Path) -> bool:
    """The value of transformers' trust_remote_code. Always pass it: without it transformers asks on the terminal."""
    return directory.resolve() in _allowed
