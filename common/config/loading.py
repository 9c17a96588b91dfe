"""Loads a config: a TOML file and `key=value` overrides become a tree of settings, or one error that has every fault.

Runs anywhere. Names of files and model directories are looked up in the current directory first, then next to the TOML
file.
"""

from __future__ import annotations

import copy
import glob
import os
import tomllib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from common.config.base import Root
from common.config.faults import fault_message
from common.config.overrides import apply_override
from common.data.source_names import LONGEST_NAME, split_options
from common.errors import UserError

AnyRoot = TypeVar("AnyRoot", bound=Root)


def load_config(path: Path, overrides: Iterable[str], root: type[AnyRoot], *, keep_relative: bool = False) -> AnyRoot:
    """The tree of kind `root` in `path` with `key=value` overrides applied. Raises UserError with every fault found.

    Names of files become absolute. With `keep_relative` they stay relative. A submitted job needs this, because its
    current directory has another path on the cluster."""
    given = tuple(overrides)
    try:
        return root.model_validate(given_settings(path, given, keep_relative=keep_relative))
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist; ratchet config --list has shipped ones") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read ({error.strerror}); name a .toml file") from None
    except RecursionError:
        raise UserError(f"config file {path} nests brackets or sections too deeply; no setting needs that") from None
    except ValidationError as error:
        raise UserError(fault_message(error, root, path, given)) from None
    except ValueError as error:  # TOML's and UTF-8's own errors, NUL in the path, a number of 5,000 digits
        raise UserError(f"config file {path} is not valid TOML: {error}") from None


def given_settings(path: Path, overrides: Iterable[str], *, keep_relative: bool = False) -> dict[str, Any]:
    """The settings that `path` and `key=value` overrides give, without defaults, and with names of files as in
    `load_config`. Raises the errors of files and of TOML."""
    tree = tomllib.loads(_text(path))
    for override in overrides:
        apply_override(tree, override)
    directories = [Path.cwd(), path.absolute().parent]
    if keep_relative:  # only the current directory is sent to the cluster
        directories = [directory for directory in directories if directory.is_relative_to(Path.cwd())]
    _find_files(tree, directories, keep_relative)
    return tree


def _text(path: Path) -> str:
    """The text of a config file. Some commands load a config several times, and a pipe, such as <(make-config) of a
    shell, can be read only once."""
    return _piped_text(path, path.stat().st_ino) if path.is_fifo() else _file_text(path)


def _file_text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")  # editors on Windows begin it with a byte order mark


@cache
def _piped_text(path: Path, pipe: int) -> str:
    return _file_text(path)


def with_absolute_files(key: str, value: Any, config: Path) -> Any:
    """The value of a setting, with names of files as `load_config` makes them for the config file `config`."""
    name = key.rpartition(".")[2]
    tree = {name: copy.deepcopy(value)}
    _find_files(tree, [Path.cwd(), config.absolute().parent], keep_relative=False)
    return tree[name]


def absolute_if_directory(name: str, directories: Sequence[Path] = (Path(),)) -> str:
    """The absolute path of a model directory, so that every process finds it. Other names, such as hub names, stay
    unchanged."""
    paths = (os.path.join(directory, os.path.expanduser(name)) for directory in directories)
    return next((os.path.realpath(path) for path in paths if name and os.path.isdir(path)), name)


def _find_files(tree: Any, directories: Sequence[Path], keep_relative: bool) -> None:
    """Makes names of model directories and data files absolute if they exist in one of the directories, because
    processes with other current directories open them, now and in a resumed run. Other names stay unchanged."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            _find_files(value, directories, keep_relative)
        elif isinstance(value, list):
            for entry in value:
                _find_files(entry, directories, keep_relative)
        elif key in ("path", "model", "policy", "critic_path") and isinstance(value, str):
            tree[key] = absolute_if_directory(value, directories)
        elif key in ("train", "heldout", "source", "text") and isinstance(value, str):
            found = _absolute_if_file(value, directories)
            tree[key] = _relative_if_below(found, value) if keep_relative else found


def _absolute_if_file(name: str, directories: Sequence[Path]) -> str:
    """Makes the name of a data file absolute, or of a data set's directory (also with options), or a pattern that data
    files match. Returns any other name unchanged."""
    pattern = os.path.expanduser(name)
    data_set, options = split_options(pattern)
    has_magic = glob.has_magic(pattern) and "\0" not in pattern and len(pattern) <= LONGEST_NAME
    for directory in directories:
        if name and os.path.exists(path := os.path.join(directory, pattern)):
            return os.path.abspath(path)
        if options and os.path.isdir(path := os.path.join(directory, data_set)):
            return f"{os.path.abspath(path)}?{options}"
        if has_magic and glob.glob(pattern, root_dir=directory, recursive=True):
            return os.path.join(glob.escape(os.path.abspath(directory)), pattern)
    return name


def _relative_if_below(found: str, given: str) -> str:
    """The file's path relative to the current directory, if the file is below it and the user gave no absolute path."""
    absolute = os.path.isabs(os.path.expanduser(given)) or not Path(found).is_relative_to(Path.cwd())
    return found if absolute else os.path.relpath(found)
