"""`key=value` settings, as the command line has them: into a tree of settings, and back into text. Runs anywhere."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from common.config.faults import shortened, without_secrets
from common.errors import UserError

_DEEPEST = 8  # most sections around a key of an override; no setting is nested as deeply


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets the value of one `key=value` in the tree."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} must read key=value, such as ppo.clip_eps=0.1")
    *sections, leaf = key.split(".")
    if len(sections) > _DEEPEST:
        raise UserError(f"override {shortened(override)}: no setting is in more than {_DEEPEST} sections")
    value = override_value(override, text)
    for name in sections:
        if isinstance(tree, list) and re.fullmatch("[0-9]{1,4}", name) and int(name) < len(tree):
            tree = tree[int(name)]  # reward.sources.0.weight
        elif isinstance(tree, dict):
            tree = tree.setdefault(name, {})
        else:
            break
    if not isinstance(tree, dict):
        parent = shortened(key.removesuffix(f".{leaf}"))
        raise UserError(f"override {without_secrets(override)!r}: {parent} is not a section, so it has no {leaf}")
    tree[leaf] = value


def override_value(override: str, text: str) -> Any:
    """The TOML value `text` of an override; a bare word is a string."""
    try:
        override.encode()
        return tomllib.loads(f"value = {text}")["value"]
    except UnicodeEncodeError:
        raise UserError(f"override {override!r} is not valid UTF-8; write it in a UTF-8 terminal") from None
    except RecursionError:
        raise UserError(f"override {shortened(override)} nests brackets too deeply") from None
    except ValueError:
        return text


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings by key as `key=value` arguments of a command."""
    return [f"{key}={toml_text(value)}" for key, value in settings.items()]


def toml_text(value: Any) -> str:
    """A TOML value on one line."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{toml_text(key)} = {toml_text(part)}' for key, part in value.items())}}}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
