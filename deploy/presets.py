"""`--preset`: a small file of settings. They override the config, and key=value settings override them. Runs in the
driver.

RUN/config.toml has the result, so a run that continues needs no preset.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common.config.overrides import as_overrides
from common.errors import UserError

DIRECTORY = Path(__file__).parent / "configs/presets"

T = TypeVar("T")


def with_preset(preset: str | None, settings: Sequence[str], load: Callable[[Sequence[str]], T]) -> T:
    """Loads a config with the settings of a preset, and then `settings`. Raises UserError."""
    if preset is None:
        return load(settings)
    given = preset_settings(preset)
    try:
        return load([*given, *settings])
    except UserError as error:
        raise UserError(f"{error}\n(--preset {preset} gives {' '.join(given)})") from None


def preset_settings(preset: str) -> list[str]:
    """The settings of a preset by its name, or of a TOML file, as key=value. Raises UserError."""
    shipped = sorted(path.stem for path in DIRECTORY.glob("*.toml"))
    path = DIRECTORY / f"{preset}.toml" if preset in shipped else Path(preset)
    if preset not in shipped and path.suffix != ".toml":
        raise UserError(f"--preset ({preset}) must be one of {', '.join(shipped)}, or a .toml file with some settings")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # as in load_config
    except OSError as error:
        raise UserError(f"preset {path} cannot be read ({error.strerror}); name another file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"preset {path} is not valid TOML: {error}") from None
    return as_overrides(dict(_leaves(tree, "")))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
