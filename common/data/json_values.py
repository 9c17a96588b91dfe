"""The values that a record's columns may hold: those of JSON. Runs anywhere.

Text has no halves of surrogate pairs, and lists and objects are nested at most DEEPEST levels. So every value can be
written to the journal, sent to an HTTP service and pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from common.errors import UserError

Record = dict[str, Any]

DEEPEST = 100
_STRICT = json.JSONEncoder(allow_nan=False)


def parse_json(where: str, text: str) -> Any:
    """The value of a JSON text. Raises UserError whose message begins with `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({error.msg} at {place}); fix or remove it") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise UserError(f"{where}: not usable JSON ({cause(error)}); fix or remove it") from None


def is_simple(text: str) -> bool:
    """A quick test: if True, json_values would accept this JSON text unchanged. False for a text with \\u escapes or
    many brackets, which must be checked value by value."""
    return "\\u" not in text and text.count("[") + text.count("{") <= DEEPEST


def as_object(where: str, record: Any) -> Record:
    """The record, checked to be an object of columns. Raises UserError otherwise."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record must be an object of columns, not {shown(record)}; fix or remove it")
    return record


def json_values(where: str, record: Any) -> Record:
    """Converts every value to one of JSON: a date to text, an array to a list. Raises UserError naming the column."""
    found = {}
    for key, value in as_object(where, record).items():
        try:
            found[_json_value(key, 0)] = _json_value(value, 1)
        except ValueError as error:
            raise UserError(f"{where}: {column_name(key)} {error}; fix it or leave it out") from None
        if not isinstance(key, str):
            raise UserError(f"{where}: a column is named {shown(key)}; names must be text")
    return found


def _json_value(value: Any, depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"is nested deeper than {DEEPEST} levels")
    match value:
        case None | bool():
            return value
        case str():
            if not value.isascii():
                _refuse_surrogates(value)
            return str.__str__(value)  # a str that is also an enum member becomes its plain value
        case int():
            if value.bit_length() > 14_000:  # Python prints at most 4,300 digits
                raise ValueError("is a number of more than 4,300 digits")
            return int(value)
        case float() | Decimal():
            return float(value)
        case date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case UUID():
            return str(value)
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                raise ValueError("is bytes that are not UTF-8 text") from None
        case Mapping():
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"has a key that is not text ({shown(wrong[0])})")
            return {_json_value(key, depth): _json_value(item, depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [_json_value(item, depth + 1) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return _json_value(value.tolist(), depth + 1)
    raise ValueError(f"is a {type(value).__name__}, which JSON does not have")


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has half of a surrogate pair ({text[error.start]!a} at character {error.start + 1}), which is not text"
        ) from None


def column_name(key: Any) -> str:
    """A column's name in backquotes, for messages."""
    return f"`{shown(key)[1:-1] if isinstance(key, str) else shown(key)}`"


def shown(value: Any) -> str:
    """A value for messages: short, and without characters that could control the terminal."""
    try:
        text = ascii(value)
    except Exception:  # nested too deeply, or a user's object whose repr fails
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def cause(error: BaseException) -> str:
    """An error in one text: its type and message."""
    return f"{type(error).__name__}: {error}"


def without_nan(where: str, fields: Record) -> Record:
    """Fields for the journal and HTTP services: NaN, which JSON lacks, becomes None. Raises UserError for other values
    that JSON lacks, such as infinity."""
    try:
        _STRICT.encode(fields)
        return fields
    except (TypeError, ValueError):
        fields = {key: _nan_to_none(value) for key, value in fields.items()}
    for key, value in fields.items():
        try:
            _STRICT.encode(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: `{key}` cannot be written to the journal as JSON ({error}); "
                "write it as text, or leave it out"
            ) from None
    return fields


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and value != value else value
