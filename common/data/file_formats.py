"""Reads records from JSON lines, JSON, CSV and Parquet files, and plain texts; also compressed. Runs anywhere.

A broken file raises a UserError that names the file, the line or row, the fault and the remedy.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.data.json_values import Record, as_object, cause, is_simple, json_values, parse_json, shown
from common.errors import UserError

Located = tuple[str, Record]  # the place of a record, for messages, and the record

_ROWS_PER_BATCH = 1024
_PYTHON_MESSAGES = re.compile(r"\[\s*\{\s*'(role|content)'\s*:")


def json_lines(path: str) -> Iterator[Located]:
    """Reads one object per line; skips empty lines."""
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            record = as_object(where, parse_json(where, line))
            yield where, record if is_simple(line) else json_values(where, record)


def json_records(path: str) -> Iterator[Located]:
    """Reads a list of objects, or an object of columns. A column is a list, or an object of values as pandas writes."""
    text = "".join(line for _, line in _lines(path))
    tree = parse_json(path, text)
    simple = is_simple(text)
    if isinstance(tree, dict):
        rows = {tuple(column) for column in tree.values() if isinstance(column, dict)}
        columns = [list(column.values()) if isinstance(column, dict) else column for column in tree.values()]
        sizes = {len(column) if isinstance(column, list) else None for column in columns}
        if len(sizes) != 1 or sizes == {None} or len(rows) > 1:
            raise UserError(
                f"{path}: it must be a list of records, or columns of equal length; convert it, or write one record a "
                "line and name it .jsonl"
            )
        tree = [dict(zip(tree, values)) for values in zip(*columns)]
    if not isinstance(tree, list):
        raise UserError(f"{path}: it must be a list of records, not {shown(tree)}; convert it")
    for number, record in enumerate(tree, 1):
        where = f"{path}, record {number}"
        yield where, as_object(where, record) if simple else json_values(where, record)


def csv_rows(path: str) -> Iterator[Located]:
    """Reads one record per row; the first line names the columns. Cells are text, but a cell with a JSON list of chat
    messages becomes messages."""
    csv.field_size_limit(sys.maxsize)  # csv's default refuses cells above 128 KiB
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    line = 1
    try:
        header = next(reader, [])
        _refuse_equal_columns(path, header)
        line = reader.line_num + 1
        for row in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{where}: {len(row)} cells, but the first line names {len(header)} columns; cells are separated "
                    'by commas, and a cell with a comma is written in quotes ("")'
                )
            yield where, {name: _csv_cell(where, name, cell) for name, cell in zip(header, row)}
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not valid CSV ({error}); fix the row that starts there") from None


def _csv_cell(where: str, name: str, cell: str) -> Any:
    if _PYTHON_MESSAGES.match(cell):
        raise UserError(
            f"{where}: `{name}` has chat messages as Python prints them ({shown(cell)}); a cell must have them as "
            "JSON: write it with json.dumps, or write the records as JSON lines"
        )
    if not cell.startswith("[") or '"role"' not in cell:
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    is_chat = isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)
    return json_values(where, {"cell": value})["cell"] if is_chat else cell


def parquet_rows(path: str) -> Iterator[Located]:
    """Reads one record per row. Dates, decimals and bytes become values of JSON."""
    number = 0
    try:
        file = pq.ParquetFile(path)
        _refuse_equal_columns(path, file.schema_arrow.names)
        simple = all(_has_json_form(field.type) for field in file.schema_arrow)
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH):
            for record in batch.to_pylist():
                number += 1
                where = f"{path}, row {number}"
                yield where, record if simple else json_values(where, record)
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many types for a broken file
        raise UserError(
            f"{path} cannot be read as Parquet after row {number} ({cause(error)}); restore or convert the file"
        ) from None


def _has_json_form(kind: pa.DataType) -> bool:
    """True if Python values of this Arrow type are values of JSON already."""
    types = pa.types
    if types.is_struct(kind):
        return all(_has_json_form(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _has_json_form(kind.value_type)
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_null,
    )
    return any(test(kind) for test in tests)


def plain_text(path: str) -> str:
    """Reads the whole file as one text."""
    return "".join(line for _, line in _lines(path))


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file with their line ends, without a byte order mark."""
    number = 0
    try:
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, (_first_line(path, line) if number == 1 else line).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: byte {error.start + 1} of the line ({error.object[error.start]:#04x}) is not "
            "UTF-8; save the file as UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after line {number} ({error}); restore the file") from None


def _first_line(path: str, line: bytes) -> bytes:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16 text; save it as UTF-8")
    if line.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is compressed with gzip; add .gz to its name")
    return line.removeprefix(b"\xef\xbb\xbf")


def _refuse_equal_columns(path: str, names: Iterable[str]) -> None:
    if equal := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{path}: several columns are named {shown(equal[0])}; rename all but one")
