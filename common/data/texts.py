"""Reads texts whose perplexity is measured: plain text files, or a column of records. Runs in the driver."""

from __future__ import annotations

import re
from collections.abc import Iterator

from common.data.file_formats import plain_text
from common.data.json_values import Record, column_name, shown
from common.data.records import matching_files, read_source
from common.errors import UserError

_PLAIN = re.compile(r"\.txt(\.gz)?$", re.IGNORECASE)


def read_texts(source: str, *, column: str, setting: str, seed: int) -> Iterator[tuple[str, str]]:
    """Every text of a source with its place, for messages. Blank texts are left out.

    source: a .txt or .txt.gz file, or a pattern of such files: each file is one text. Or a source of records
    (common/data/records.py): each record has one text in `column`. Raises UserError that names the place.
    """
    if _PLAIN.search(source):
        paths = matching_files(source)
        if not paths:
            raise UserError(f"{setting} ({source}): there is no such file; check the name")
        found = ((path, plain_text(path)) for path in paths)
    else:
        records = read_source(source, setting, seed=seed)
        found = ((where, _text(where, record, column, setting)) for where, record in records)
    yield from ((where, text) for where, text in found if text.strip())


def _text(where: str, record: Record, column: str, setting: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        known = ", ".join(column_name(other) for other in list(record)[:20]) or "none"
        what = f"is {shown(value)}, not text" if column in record else f"does not exist; the record has {known}"
        raise UserError(f"{where}: the column `{column}` {what}; fix the record, or set {setting}_column")
    return value
