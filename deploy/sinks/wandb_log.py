"""The rows that W&B has written to its own log, RUN/wandb/...run-TIME-ID/run-ID.wandb. Runs in the driver.

W&B writes its log with a delay, and does not report what it has written. So after a kill only the log itself shows
which rows it has. It has LevelDB's log format: blocks of 32 KiB with fragments of records, each after a header of
checksum, length and kind.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7
_ENDS = (1, 4)  # kinds of fragments that end a record: its only fragment, and its last one


def last_row(directory: Path, run_id: str) -> int:
    """The highest number of a row in the logs of all starts of this W&B run; -1 if they have none."""
    steps = (step for path in directory.glob(f"wandb/*run-*/run-{run_id}.wandb") for step in _steps(path))
    return max(steps, default=-1)


def _steps(path: Path) -> Iterator[int]:
    protocol: Any = import_module("wandb.proto.wandb_internal_pb2")
    for data in _records(path.read_bytes()):
        record = protocol.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            yield from (int(json.loads(item.value_json)) for item in record.history.item if "_step" in _key(item))


def _key(item: Any) -> tuple[str, ...]:
    return (item.key, *item.nested_key)


def _records(data: bytes) -> Iterator[bytes]:
    place, record = _HEADER, b""  # W&B's own header has the same length
    while place + _HEADER <= len(data):
        if (left := _BLOCK - place % _BLOCK) < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        end = place + _HEADER + length
        if end > len(data):  # cut short by a kill
            return
        record += data[place + _HEADER : end]
        place = end
        if kind in _ENDS:
            yield record
            record = b""
