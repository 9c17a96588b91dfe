"""The faults of a config file in words: where each one is, what is wrong, and the remedy. Runs anywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.config.base import Section
from common.config.description import describe, section_of
from common.config.sources import SOURCE_KINDS

_LONGEST_SHOWN = 200  # characters of the user's text in a message


def fault_message(error: ValidationError, root: type[Section], path: Path, overrides: Sequence[str]) -> str:
    """All faults that pydantic found, one per line. The line above them names the file or the overrides at fault."""
    faults = [(fault, _explain(fault, root)) for fault in error.errors()]
    lines = "\n".join(f"  {text}" for _, text in faults)
    return f"{_place(path, overrides, faults)} {len(faults)} fault(s):\n{lines}"


def without_secrets(override: str) -> str:
    """An override as a message may show it: addresses and headers of services may hold passwords and keys."""
    key, _, text = override.partition("=")
    return f"{key}=..." if "{" in text or "://" in text or ".headers." in key else shortened(override)


def shortened(text: str) -> str:
    """The user's text, cut to a length that fits into a message."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} ..."


def _place(path: Path, overrides: Sequence[str], faults: Sequence[tuple[Any, str]]) -> str:
    """The beginning of the message. It says whether the faults are in the file, on the command line, or in both."""
    blamed = [[override for override in overrides if _is_about(override, fault, text)] for fault, text in faults]
    given = " ".join(
        without_secrets(override) for override in dict.fromkeys(overrides) if any(override in part for part in blamed)
    )
    if not given:
        return f"config {path} has"
    if all(blamed) and all(fault["loc"] for fault, _ in faults):
        return f"the command line ({given}) has"
    return f"config {path} with {given} has"


def _is_about(override: str, fault: Any, text: str) -> bool:
    """True if the fault is in the key that the override sets, or breaks a rule whose message `text` names that key."""
    key = override.partition("=")[0]
    if not (place := ".".join(_keys(fault["loc"]))):
        return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", text) is not None
    return f"{place}.".startswith(f"{key}.")


def _explain(fault: Any, root: type[Section]) -> str:
    """One pydantic error in the words of the file: key, what is wrong, remedy."""
    key = shortened(".".join(map(_visible, _keys(fault["loc"]))))
    match fault["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key; {_nearest_keys(fault['loc'], root)}"
        case "missing":
            return f"{key}: required and missing"
        case "value_error":
            text = "\n".join(map(_without_middle, str(fault["ctx"]["error"]).split("\n")))
            return f"{key}: {text}" if key else text
        case _:
            return f"{key} = {_shown(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _nearest_keys(loc: Sequence[str | int], root: type[Section]) -> str:
    """A hint for an unknown key: a similar key of its section, and the same key of other sections."""
    *parents, leaf = loc
    close = get_close_matches(str(leaf), _names_at(parents, root), n=1, cutoff=0.5)
    if not any(isinstance(part, int) for part in parents):
        places = [known for known, *_ in describe(root) if known.endswith(f".{leaf}") and "[" not in known]
        close = [*close, *places] if parents else places or close
    return f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(_names_at(parents, root))}"


def _names_at(parents: list[Any], root: type[Section]) -> list[str]:
    """The keys of the section at this place."""
    section = root
    for before, part in zip([None, *parents], parents):
        if isinstance(before, int):  # pydantic puts the kind of a reward source after its index
            section = SOURCE_KINDS[part]
        elif isinstance(part, str):
            section = section_of(section.model_fields[part]) or section
    return list(section.model_fields)


def _keys(loc: Sequence[str | int]) -> list[str]:
    """The keys of a fault as the file has them, without the kind that pydantic adds after a reward source's index."""
    return [str(part) for k, part in enumerate(loc) if not (k and isinstance(loc[k - 1], int))]


def _shown(value: Any) -> str:
    """A wrong value as a message may show it: only the keys of a table, since it may hold passwords."""
    if isinstance(value, dict):
        return shortened(f"{{{', '.join(map(_visible, value))}}}")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return shortened(re.sub("://[^/]*@", "://", repr(value)))


def _visible(key: str) -> str:
    """The key; quoted if it is empty or has line ends."""
    return key if key.isprintable() and key.strip() == key != "" else repr(key)


def _without_middle(text: str) -> str:
    """A rule's message, shortened in its middle. The fault is at its beginning, the remedy at its end."""
    return text if len(text) <= 4 * _LONGEST_SHOWN else f"{text[: 2 * _LONGEST_SHOWN]} ... {text[-_LONGEST_SHOWN:]}"
