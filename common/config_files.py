"""Configuration files: a TOML file and `key=value` overrides to a tree of `common/config.py`, or every fault in it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Container, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from common.config import SOURCE_KINDS, RewardSource, Root, Section, UserError

AnyRoot = TypeVar("AnyRoot", bound=Root)


def load_config(path: Path, overrides: Iterable[str], root: type[AnyRoot]) -> AnyRoot:
    """The tree of kind `root` in `path` with `key=value` overrides applied. Raises UserError with every fault found."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist; shipped ones lie in deploy/configs/") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read ({error.strerror}); name a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(tree, override)
    _make_models_absolute(tree)
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault, root)}" for fault in error.errors())
        raise UserError(f"config {path} has {error.error_count()} fault(s):\n{faults}") from None


def describe(section: type[Section], prefix: str = "", *, skip: Container[str] = ()) -> Iterator[tuple[str, ...]]:
    """(key, type, default, meaning) of every field not in `skip`, depth first, in the order of the file."""
    for name, field in section.model_fields.items():
        if name in skip:
            continue
        if (nested := _section(field)) is not None:
            yield from describe(nested, f"{prefix}{name}.")
            continue
        yield prefix + name, _type_name(field), _default(field), " ".join((field.description or "").split())
        if name == "sources":  # judges are described by them too
            yield from describe(RewardSource, f"{prefix}{name}[].")
            for source in SOURCE_KINDS.values():
                yield from describe(source, f"{prefix}{name}[].", skip=RewardSource.model_fields)


def _make_models_absolute(tree: Any) -> None:
    """Model directories are opened by processes that may have been started elsewhere."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            _make_models_absolute(value)
        elif isinstance(value, list):
            for entry in value:
                _make_models_absolute(entry)
        elif key in ("path", "model", "policy") and isinstance(value, str):
            tree[key] = absolute_if_directory(value)


def absolute_if_directory(name: str) -> str:
    """A model directory as every process finds it; any other name as it is."""
    path = Path(os.path.expanduser(name))
    return str(path.resolve()) if name and path.is_dir() else name


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} must read key=value, such as ppo.clip_eps=0.1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, leaf = key.split(".")
    for name in sections:
        if isinstance(tree, list) and name.isdigit() and int(name) < len(tree):  # reward.sources.0.weight
            tree = tree[int(name)]
        elif isinstance(tree, dict):
            tree = tree.setdefault(name, {})
        else:
            break
    if not isinstance(tree, dict):
        raise UserError(f"override {override!r}: {leaf} would be set inside a value that is no section of settings")
    tree[leaf] = value


def _explain(fault: Any, root: type[Section]) -> str:
    """One pydantic error in the words of the file: key, what is wrong, remedy."""
    loc = fault["loc"]
    # Behind the index of a reward source pydantic puts its kind, which the file does not have.
    key = ".".join(str(part) for k, part in enumerate(loc) if not (k and isinstance(loc[k - 1], int)))
    match fault["type"]:
        case "extra_forbidden":
            *parents, leaf = (part for part in fault["loc"])
            close = get_close_matches(str(leaf), _names_at(parents, root), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(_names_at(parents, root))}"
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: required and missing"
        case "value_error":
            return str(fault["ctx"]["error"]) if not key else f"{key}: {fault['ctx']['error']}"
        case _:
            return f"{key} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _names_at(parents: list[Any], root: type[Section]) -> list[str]:
    section = root
    for before, part in zip([None, *parents], parents):
        if isinstance(before, int):  # the kind of a reward source, which pydantic puts behind its index
            section = SOURCE_KINDS[part]
        elif isinstance(part, str):
            section = _section(section.model_fields[part]) or section
    return list(section.model_fields)


def _section(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or may hold."""
    kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _type_name(field: FieldInfo) -> str:
    bounds = [
        f"{symbol} {value}"
        for item in field.metadata
        for name, symbol in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if (value := getattr(item, name, None)) is not None
    ]
    kind = field.annotation
    if getattr(kind, "__origin__", None) is tuple:
        text = "list"
    elif getattr(kind, "__origin__", None) is Literal:
        text = " | ".join(kind.__args__)  # type: ignore[union-attr]
    elif isinstance(kind, type) and not hasattr(kind, "__origin__"):
        text = {"int": "integer", "float": "number", "str": "text", "bool": "true | false"}.get(
            kind.__name__, kind.__name__
        )
    else:
        args = [a for a in getattr(kind, "__args__", ()) if a is not type(None)]
        if len(args) == 1:  # or none
            return _type_name(FieldInfo.from_annotation(args[0]))
        text = {int: "integer", float: "number", str: "text"}.get(args[0] if args else kind, "list")  # type: ignore[arg-type]
    return " ".join([text, *bounds])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "none"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
