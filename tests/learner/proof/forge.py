"""Journals with a lie in them whose hashes are all right, as an error of the code that writes them would make them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Change = Callable[[pa.Table, dict[str, Any]], pa.Table]


def entries(run: Path) -> list[Path]:
    """The journal's files in order: notes come before their step."""
    paths = [*(run / "journal").glob("step-*.arrow"), *(run / "journal").glob("note-*.json")]
    return sorted(paths, key=lambda path: (path.stem.split("-")[1], path.suffix == ".arrow", path.stem))


def forge_step(run: Path, step: int, change: Change) -> None:
    """Changes the rows or the metadata of a step, and chains everything after it again."""
    path = run / f"journal/step-{step:06d}.arrow"
    table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    about = json.loads(table.schema.metadata[b"ratchet"])
    _write_step(path, change(table, about), about)
    chain_again(run)


def forge_note(run: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = run / "journal" / name
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))
    chain_again(run)


def add_note(run: Path, before_step: int, kind: str, **about: Any) -> None:
    """Adds a note behind all others before this step."""
    number = len(list((run / "journal").glob(f"note-{before_step:06d}-*.json")))
    head = {"schema": 9, "before_step": before_step, "number": number, "kind": kind, "time": 0.0, "previous": ""}
    (run / f"journal/note-{before_step:06d}-{number:03d}.json").write_text(json.dumps({**head, **about}))
    chain_again(run)


def chain_again(run: Path) -> None:
    """Gives every entry the hash of the one before it, and its own .sha256."""
    previous = ""
    for path in entries(run):
        if path.suffix == ".arrow":
            table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
            about = json.loads(table.schema.metadata[b"ratchet"])
            if about["previous"] != previous:
                _write_step(path, table, {**about, "previous": previous})
        else:
            about = json.loads(path.read_text())
            path.write_text(json.dumps({**about, "previous": previous}, indent=2) + "\n")
        previous = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_suffix(".sha256").write_text(f"{previous}  {path.name}\n")
        if path.suffix == ".arrow":
            _stamp_credit(run, int(path.stem[5:]), previous)


def _stamp_credit(run: Path, step: int, digest: str) -> None:
    forge_credit(run, step, lambda table, about: about.update(journal=digest))


def _write_step(path: Path, table: pa.Table, about: dict[str, Any]) -> None:
    schema = table.schema.with_metadata({"ratchet": json.dumps(about)})
    with open(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table.cast(schema))


def forge_credit(run: Path, step: int, change: Callable[[pa.Table, dict[str, Any]], pa.Table | None]) -> None:
    """Changes the columns or the metadata of a file of RUN/credit, if there is one."""
    path = run / f"credit/step-{step:06d}.parquet"
    if path.exists():
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"ratchet"])
        before = dict(about)
        changed = change(table, about)
        if changed is not None or about != before:
            metadata = {"ratchet": json.dumps(about)}
            pq.write_table((table if changed is None else changed).replace_schema_metadata(metadata), path)


def replace_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), pa.array(values, type=table.schema.field(index).type))


def forge_checkpoint(run: Path, step: int, name: str, change: Callable[[bytes], bytes]) -> None:
    """Changes a file of a checkpoint, and its hash in the marker."""
    directory = run / f"checkpoints/step-{step:06d}"
    data = change((directory / name).read_bytes())
    (directory / name).write_bytes(data)
    marker = json.loads((directory / "COMPLETE").read_text())
    marker["files"][name] = hashlib.sha256(data).hexdigest()
    (directory / "COMPLETE").write_text(json.dumps(marker))
