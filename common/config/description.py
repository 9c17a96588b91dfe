"""Every setting with its type, default and meaning, and how it may change when a run continues. Runs anywhere."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Literal, NamedTuple

from pydantic.fields import FieldInfo

from common.config.base import MAY_CHANGE, RECORDED, Section
from common.config.sources import SOURCE_KINDS, RewardSource


class Setting(NamedTuple):
    """One setting, as `ratchet config --describe` prints it."""

    key: str
    kind: str
    default: str
    meaning: str
    change: str  # MAY_CHANGE or RECORDED; empty: it is fixed when the run begins


def describe(
    section: type[Section], prefix: str = "", *, skip: Container[str] = (), change: str = ""
) -> Iterator[Setting]:
    """Every setting, depth first, in the order of the fields. `skip`: fields to leave out. `change`: the mark of the
    whole section, which then holds for all its fields."""
    for name, field in section.model_fields.items():
        if name in skip:
            continue
        changes = change or next((mark for mark in (MAY_CHANGE, RECORDED) if mark in field.metadata), "")
        if (nested := section_of(field)) is not None:
            yield from describe(nested, f"{prefix}{name}.", change=changes)
            continue
        meaning = " ".join((field.description or "").split())
        yield Setting(prefix + name, _type_name(field), _default(field), meaning, changes)
        if name == "sources":  # describe every kind of source; evaluation.judges has the same kinds
            described: set[str] = set()
            kinds: list[type[RewardSource]] = [RewardSource, *SOURCE_KINDS.values()]
            for source in kinds:
                yield from describe(source, f"{prefix}{name}[].", skip=described, change=changes)
                described |= source.model_fields.keys()


def changeable(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The keys that may change when a run continues. A section that may change as a whole is one key that ends with a
    dot."""
    return _marked(section, MAY_CHANGE, prefix)


def recorded(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The keys that may change when a run continues if the journal records the change."""
    return _marked(section, RECORDED, prefix)


def _marked(section: type[Section], mark: str, prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        nested = section_of(field)
        if mark in field.metadata:
            yield f"{prefix}{name}" if nested is None else f"{prefix}{name}."
        elif nested is not None:
            yield from _marked(nested, mark, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[Section] | None:
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
        choices = kind.__args__  # type: ignore[union-attr]
        text = " | ".join("true" if choice is True else choice for choice in choices)
    elif getattr(kind, "__origin__", None) is Mapping:
        text = "table"
    elif isinstance(kind, type) and not hasattr(kind, "__origin__"):
        text = {"int": "integer", "float": "number", "str": "text", "bool": "true | false"}.get(
            kind.__name__, kind.__name__
        )
    else:
        args = [a for a in getattr(kind, "__args__", ()) if a is not type(None)]
        if len(args) == 1:  # or none
            return _type_name(FieldInfo.from_annotation(args[0]))
        text = " | ".join(_type_name(FieldInfo.from_annotation(arg)) for arg in args)
    return " ".join([text, *bounds])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "none"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
