"""Writes records to files of every kind that prompts and pairs may have, with odd content, structure and bytes."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.fuzz.mutate import json_text, mutate_bytes, mutate_text, mutate_tree

SUFFIXES = (".jsonl", ".jsonl", ".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every byte, so that it knows every text, and the special tokens of a chat model."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_records(rng: Random, records: list[dict[str, Any]], directory: Path, *, suffix: str = "") -> Path:
    """Writes changed records to a file of a random kind. The bytes of one file in four are changed too."""
    suffix = suffix or rng.choice(SUFFIXES)
    changed = mutate_tree(rng, records, changes=3, json_only=True) if rng.random() < 0.8 else records
    rows = changed if isinstance(changed, list) else [changed]
    if suffix.startswith(".jsonl"):
        data = ("\n".join(json_text(rng, row) for row in rows) + "\n").encode("utf-8", "surrogatepass")
    elif suffix == ".json":
        data = json_text(rng, changed).encode("utf-8", "surrogatepass")
    elif suffix == ".csv":
        data = _csv(rows)
    else:
        data = _parquet(rows)
    if suffix in (".jsonl", ".jsonl.gz", ".json", ".csv") and rng.random() < 0.15:
        data = mutate_text(rng, data.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        data = mutate_bytes(rng, data)
    if suffix.endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    if rng.random() < 0.1:
        data = mutate_bytes(rng, data)
    path = directory / f"records{suffix}"
    path.write_bytes(data)
    return path


def _csv(rows: list[Any]) -> bytes:
    flat = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    columns = list(dict.fromkeys(str(key) for row in flat for key in row)) or ["prompt"]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in flat:
        values = [row.get(column, "") for column in columns]
        writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in values])
    return text.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: list[Any]) -> bytes:
    """A Parquet file. A column whose values Arrow cannot hold is written as JSON text."""
    flat = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    columns = dict.fromkeys(str(key) for row in flat for key in row)
    arrays = [_column([row.get(name) for row in flat]) for name in columns]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, names=list(columns)), sink)
    return sink.getvalue()


def _column(values: list[Any]) -> pa.Array:
    try:
        found = pa.array(values)
        pq.write_table(pa.table([found], names=["a"]), io.BytesIO())  # Parquet cannot hold every type of Arrow
        return found
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        return pa.array([json.dumps(value) for value in values])
