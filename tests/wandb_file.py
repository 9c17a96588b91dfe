"""Reads what W&B's offline mode has written: the records of run-ID.wandb, which has LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
WHOLE, LAST = 1, 4  # kinds of fragments that end a record


def records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = path.read_bytes(), HEADER, b""  # the file begins with a header of the same length
    while place + HEADER <= len(data):
        if (left := BLOCK - place % BLOCK) < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + HEADER + length > len(data):
            return  # the rest was never written
        record += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (WHOLE, LAST):
            yield Record.FromString(record)
            record = b""


def history(directory: Path) -> list[dict[str, Any]]:
    """The rows of every offline run below RUN/wandb, in the order of the runs, without W&B's times."""
    rows = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows.append({k: json.loads(v) for k, v in items.items() if k not in ("_timestamp", "_runtime")})
    return rows


def config(directory: Path) -> dict[str, Any]:
    """The config of the newest offline run."""
    *_, path = sorted(directory.glob("wandb/offline-run-*/*.wandb"))
    runs = [record.run for record in records(path) if record.WhichOneof("record_type") == "run"]
    return {update.key: json.loads(update.value_json) for update in runs[0].config.update}
