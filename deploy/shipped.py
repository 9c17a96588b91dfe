"""The configs that Ratchet ships, by name: `ratchet train larger` needs no checkout. Runs in the driver."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from textwrap import fill
from typing import TypeVar

from common.errors import UserError

DIRECTORY = Path(__file__).parent / "configs"

T = TypeVar("T", str, Path, None)


def shipped_configs() -> dict[str, Path]:
    """The file of each shipped config, by name."""
    return {path.stem: path for path in sorted(DIRECTORY.glob("*.toml"), key=lambda path: path.stem)}


def config_file(given: T) -> T:
    """The file of a shipped config for its name; anything else unchanged. The command line calls it for every config
    argument. So a user's own file with the name of a shipped config must be given as ./NAME."""
    shipped = shipped_configs()
    return type(given)(shipped[str(given)]) if given is not None and str(given) in shipped else given


def listing() -> str:
    """Every shipped config with the comment at its beginning, for `ratchet config --list`."""
    comments = {name: _comment(path.read_text(encoding="utf-8")) for name, path in shipped_configs().items()}
    return "\n".join(
        f"{name}\n" + fill(comment, 100, initial_indent="    ", subsequent_indent="    ")
        for name, comment in comments.items()
    )


def shipped_text(config: Path) -> str:
    """The text of a shipped config, as a start for the user's own. Raises UserError for another file."""
    if config not in shipped_configs().values():
        raise UserError(f"{config} is no shipped config; ratchet config --list shows those that are")
    return config.read_text(encoding="utf-8")


def _comment(text: str) -> str:
    """The comment at the beginning of a file, as one line."""
    return " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines()))
