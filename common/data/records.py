"""Records of prompts and preference pairs: from files of every format, or from a Python function. Runs anywhere.

Values are those of common/data/json_values.py, whatever the format. Numbers may be NaN or infinite.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.data.json_values import Record, as_object, cause, is_simple, json_values, parse_json, shown
from common.errors import UserError
from common.user_code.functions import load_function

Located = tuple[str, Record]  # where it is, for messages, and the record

FORMATS = "JSON lines (.jsonl), JSON (.json), CSV (.csv), each also compressed (.gz), and Parquet (.parquet)"
_ROWS_PER_BATCH = 1024
_LONGEST_NAME = 4096  # Linux's own limit; matching a longer pattern can take minutes
_FILE = re.compile(r"\.(jsonl|json|csv)(\.gz)?$|\.parquet$", re.IGNORECASE)


def read_source(source: str, setting: str, *, seed: int) -> Iterator[Located]:
    """Every record of a source, one at a time. Raises UserError that names the file and line of what is broken.

    source: a file, a pattern of file names, or `module:function`, which is called with the seed.
    """
    if is_function(source, setting):
        yield from _function_records(source, setting, seed)
        return
    paths = matching_files(source)
    if not paths:
        raise UserError(f"{setting} ({source}): there is no such file; check the name. Formats: {FORMATS}")
    for path in paths:
        kind = _FILE.search(path)
        if kind is None:
            raise UserError(f"{setting}: the format of {path} is not known by its ending; known are {FORMATS}")
        if kind[1] is None:
            yield from _parquet_rows(path)
        elif kind[1].lower() == "jsonl":
            yield from _json_lines(path)
        elif kind[1].lower() == "csv":
            yield from _csv_rows(path)
        else:
            yield from _json_records(path)


def is_function(source: str, setting: str) -> bool:
    """True for `module:function`, False for names of files. Raises UserError for what is neither."""
    name = os.path.expanduser(source)
    if os.path.isfile(name) or _FILE.search(name) or glob.has_magic(name):
        return False
    module, _, function = source.partition(":")
    if function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return True
    what = "is a directory" if os.path.isdir(name) else "is neither a file nor a function"
    raise UserError(
        f"{setting} ({source}) {what}; give a file, a pattern such as data/*.parquet, or module:function. "
        f"Formats: {FORMATS}"
    )


def matching_files(source: str) -> list[str]:
    """The files that a name or pattern stands for, in the order of their names."""
    name = os.path.expanduser(source)
    if os.path.isfile(name):
        return [name]
    if len(name) > _LONGEST_NAME:
        return []
    try:
        return sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
    except ValueError:  # characters that no name may have
        return []


# Formats


def _json_lines(path: str) -> Iterator[Located]:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            record = as_object(where, parse_json(where, line))
            yield where, record if is_simple(line) else json_values(where, record)


def _json_records(path: str) -> Iterator[Located]:
    """A list of objects, or an object of columns: each a list, or an object of values by row as pandas writes it."""
    text = "".join(line for _, line in _lines(path))
    tree = parse_json(path, text)
    simple = is_simple(text)
    if isinstance(tree, dict):
        rows = {tuple(column) for column in tree.values() if isinstance(column, dict)}
        columns = [list(column.values()) if isinstance(column, dict) else column for column in tree.values()]
        sizes = {len(column) if isinstance(column, list) else None for column in columns}
        if len(sizes) != 1 or sizes == {None} or len(rows) > 1:
            raise UserError(
                f"{path}: it must hold a list of records, or columns of one length; convert it, or write one record a "
                "line and name it .jsonl"
            )
        tree = [dict(zip(tree, values)) for values in zip(*columns)]
    if not isinstance(tree, list):
        raise UserError(f"{path}: it must hold a list of records, not {shown(tree)}; convert it")
    for number, record in enumerate(tree, 1):
        where = f"{path}, record {number}"
        yield where, as_object(where, record) if simple else json_values(where, record)


def _csv_rows(path: str) -> Iterator[Located]:
    """Cells are text. A list of chat messages, written in a cell as JSON, becomes one."""
    csv.field_size_limit(sys.maxsize)  # by itself csv refuses cells of more than 128 KiB
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
                    'by commas, and a cell that holds one is written in quotes ("")'
                )
            yield where, {name: _csv_cell(where, cell) for name, cell in zip(header, row)}
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not valid CSV ({error}); fix the row that begins there") from None


def _csv_cell(where: str, cell: str) -> Any:
    if not cell.startswith("[") or '"role"' not in cell:
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    is_chat = isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)
    return json_values(where, {"cell": value})["cell"] if is_chat else cell


def _parquet_rows(path: str) -> Iterator[Located]:
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
    except Exception as error:  # a broken file can raise about anything
        raise UserError(
            f"{path} cannot be read as Parquet after row {number} ({cause(error)}); restore or convert the file"
        ) from None


def _has_json_form(kind: pa.DataType) -> bool:
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


def _function_records(source: str, setting: str, seed: int) -> Iterator[Located]:
    function = load_function(source, setting)
    number = 0
    try:
        for number, record in enumerate(function(seed), 1):
            where = f"{source}, record {number}"
            yield where, json_values(where, dict(record) if isinstance(record, Mapping) else record)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{setting} ({source}) did not give a list of records: after record {number} it raised {cause(error)}; "
            "fix the function"
        ) from error


# Text files


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, line ends included, without a byte order mark."""
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
