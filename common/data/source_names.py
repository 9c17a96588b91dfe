"""The names of sources of records: the kind of source that a name means, and its options. Runs anywhere."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from common.errors import UserError

FORMATS = "JSON lines (.jsonl), JSON (.json), CSV (.csv), each also compressed (.gz), and Parquet (.parquet)"
FILE = re.compile(r"\.(jsonl|json|csv)(\.gz)?$|\.(parquet)$", re.IGNORECASE)
_HUB, _REASONING_GYM, _VERIFIERS = "hf:", "reasoning-gym:", "verifiers:"
_WITH_OPTIONS = re.compile(r"([^?]+)\?(\w+=.*)", re.DOTALL)
# `datasets` would take a name without an owner, such as json, for its own reader of files in the current directory.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_DIRECTORY_OPTIONS = ("split", "config")
_HUB_OPTIONS = (*_DIRECTORY_OPTIONS, "revision")
_HELDOUT = ("prompts.heldout", "data.heldout", "evaluation.text")
LONGEST_NAME = 4096  # Linux's own limit; matching a longer pattern can take minutes


@dataclass(frozen=True)
class ParsedSource:
    """The meaning of a source's name. `name` has neither prefix nor options."""

    kind: Literal["files", "directory", "function", "hub", "reasoning_gym", "verifiers"]
    name: str
    options: Mapping[str, str] = field(default_factory=dict)  # split, config and revision of a data set


def parsed_source(source: str, setting: str) -> ParsedSource:
    """The meaning of a source's name. Raises UserError if it has none. Files need not exist."""
    if source.startswith(_HUB):
        name, options = _with_options(source.removeprefix(_HUB), source, setting, _HUB_OPTIONS)
        if not _HUB_NAME.fullmatch(name):
            raise UserError(f"{setting} ({source}): a data set of the hub is named as in hf:OWNER/NAME?split=train")
        return ParsedSource("hub", name, options)
    if is_reasoning_gym(source):
        return ParsedSource("reasoning_gym", source.removeprefix(_REASONING_GYM))
    if source.startswith(_VERIFIERS):
        return ParsedSource("verifiers", source.removeprefix(_VERIFIERS))
    name = os.path.expanduser(source)
    if os.path.isdir(name):
        return ParsedSource("directory", name)
    if os.path.isfile(name) or FILE.search(name):
        return ParsedSource("files", name)
    directory, options_text = split_options(name)
    if options_text and os.path.isdir(directory):
        return ParsedSource("directory", *_with_options(name, source, setting, _DIRECTORY_OPTIONS))
    if glob.has_magic(name):
        return ParsedSource("files", name)
    module, _, function = source.partition(":")
    if function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return ParsedSource("function", source)
    raise UserError(
        f"{setting} ({source}) is neither a file, a directory nor a function; give a file, a pattern such as "
        f"data/*.parquet, the directory of a data set, module:function, hf:OWNER/NAME, reasoning-gym:TASK or "
        f"verifiers:TASKSET. Formats: {FORMATS}"
    )


def split_options(source: str) -> tuple[str, str]:
    """A name and the text of its options: `data/gsm8k?split=test` has `split=test`. "" if there are none."""
    found = _WITH_OPTIONS.fullmatch(source)
    return (found[1], found[2]) if found else (source, "")


def matching_files(source: str) -> list[str]:
    """The files that a name or pattern matches, sorted by name."""
    name = os.path.expanduser(source)
    if os.path.isfile(name):
        return [name]
    if len(name) > LONGEST_NAME:
        return []
    try:
        return sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
    except ValueError:  # a character that no file name may have
        return []


def is_reasoning_gym(source: str) -> bool:
    """True if the name is that of a task of reasoning-gym."""
    return source.startswith(_REASONING_GYM)


def is_heldout(setting: str) -> bool:
    """True for the settings of held-out records."""
    return setting in _HELDOUT


def _with_options(text: str, source: str, setting: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    name, options_text = split_options(text)
    options: dict[str, str] = {}
    for option in options_text.split("&") if options_text else ():
        key, _, value = option.partition("=")
        if key not in known or not value or key in options:
            raise UserError(
                f"{setting} ({source}): {option!r} is not an option of a data set; the options are "
                f"{', '.join(known)}, each at most once, as in {name}?split=train"
            )
        options[key] = value
    return name, options
