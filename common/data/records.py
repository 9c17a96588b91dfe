"""Reads records of prompts and preference pairs from any source that has a name. Runs anywhere.

common/data/source_names.py says which names there are, common/data/json_values.py which values records may have.
Numbers may also be NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from common.config.actors import ReasoningGymConfig
from common.data.data_sets import data_set_rows
from common.data.file_formats import Located, csv_rows, json_lines, json_records, parquet_rows
from common.data.json_values import cause, json_values
from common.data.reasoning_gym_prompts import task_prompts
from common.data.source_names import FILE, FORMATS, matching_files, parsed_source
from common.data.verifiers_prompts import taskset_prompts
from common.errors import UserError
from common.user_code.functions import load_function

_READERS: dict[str, Callable[[str], Iterator[Located]]] = {
    "jsonl": json_lines,
    "json": json_records,
    "csv": csv_rows,
    "parquet": parquet_rows,
}


def read_source(
    source: str, setting: str, *, seed: int, reasoning_gym: ReasoningGymConfig | None = None
) -> Iterator[Located]:
    """Every record of a source, one after another. Raises UserError that names file and line of a broken one.

    seed: for functions and reasoning-gym. reasoning_gym: its settings; None if the records are not prompts.
    """
    named = parsed_source(source, setting)
    match named.kind:
        case "files":
            yield from _file_records(source, setting)
        case "function":
            yield from _function_records(source, setting, seed)
        case "reasoning_gym":
            if reasoning_gym is None:
                raise UserError(f"{setting} ({source}): reasoning-gym has prompts only; name another source")
            yield from task_prompts(named.name, setting, reasoning_gym, seed=seed)
        case "verifiers":
            if reasoning_gym is None:
                raise UserError(f"{setting} ({source}): verifiers has prompts only; name another source")
            yield from taskset_prompts(named.name, setting)
        case "directory" | "hub":
            yield from data_set_rows(named, source, setting)


def _file_records(source: str, setting: str) -> Iterator[Located]:
    paths = matching_files(source)
    if not paths:
        raise UserError(f"{setting} ({source}): there is no such file; check the name. Formats: {FORMATS}")
    for path in paths:
        kind = FILE.search(path)
        if kind is None:
            raise UserError(f"{setting}: the ending of {path} names no known format; known are {FORMATS}")
        yield from _READERS[(kind[1] or kind[3]).lower()](path)


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
