"""Reads records of prompts and preference pairs from files or a Python function. Runs anywhere.

common/data/json_values.py says which values they may have. Numbers may also be NaN or infinite.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping

from common.data.file_formats import Located, csv_rows, json_lines, json_records, parquet_rows
from common.data.json_values import cause, json_values
from common.errors import UserError
from common.user_code.functions import load_function

FORMATS = "JSON lines (.jsonl), JSON (.json), CSV (.csv), each also compressed (.gz), and Parquet (.parquet)"
_LONGEST_NAME = 4096  # Linux's own limit; matching a longer pattern can take minutes
_FILE = re.compile(r"\.(jsonl|json|csv)(\.gz)?$|\.(parquet)$", re.IGNORECASE)
_READERS: dict[str, Callable[[str], Iterator[Located]]] = {
    "jsonl": json_lines,
    "json": json_records,
    "csv": csv_rows,
    "parquet": parquet_rows,
}


def read_source(source: str, setting: str, *, seed: int) -> Iterator[Located]:
    """Every record of a source, one after another. Raises UserError that names file and line of a broken one.

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
            raise UserError(f"{setting}: the ending of {path} names no known format; known are {FORMATS}")
        yield from _READERS[(kind[1] or kind[3]).lower()](path)


def is_function(source: str, setting: str) -> bool:
    """True for `module:function`, False for names of files. Raises UserError if the source is neither."""
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
    """The files that a name or pattern matches, sorted by name."""
    name = os.path.expanduser(source)
    if os.path.isfile(name):
        return [name]
    if len(name) > _LONGEST_NAME:
        return []
    try:
        return sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
    except ValueError:  # a character that no file name may have
        return []


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
