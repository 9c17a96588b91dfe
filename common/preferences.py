"""Preference pairs: files of records, once tokenised to an Arrow file, then read from there in any order.

The Arrow file is mapped, not loaded: data larger than memory works, and every epoch may have its own full shuffle.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from common.config import UserError
from common.dialogues import Text, as_messages, dialogue_ids, padding_id, split_hh
from common.reward_config import PreferencesConfig

_ROWS_PER_BATCH = 1024

PAIR_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),  # JSON: text or chat messages
        ("prompt_hash", pa.int64()),
        ("shared_ids", pa.list_(pa.int32())),  # with these both sequences begin
        ("chosen_ids", pa.list_(pa.int32())),  # then each goes on in its own way, with at least one token
        ("rejected_ids", pa.list_(pa.int32())),
        ("margin", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, the first one preferred. Both sequences begin with `shared_ids`."""

    shared_ids: np.ndarray  # int32
    chosen_ids: np.ndarray  # int32, the rest of the preferred sequence
    rejected_ids: np.ndarray  # int32, the rest of the other
    margin: float = 0.0

    @property
    def num_tokens(self) -> int:
        """What a forward pass over both costs, the shared tokens once."""
        return len(self.shared_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass
class PairCounts:
    """What was found in a file of pairs."""

    pairs: int = 0  # kept
    empty: int = 0  # dropped: a side has no text
    identical: int = 0  # dropped: both sides are the same tokens
    cut: int = 0  # kept, shortened to max_tokens
    overlong: int = 0  # dropped: longer than max_tokens, and not to be cut

    def __str__(self) -> str:
        found = {"empty": self.empty, "identical": self.identical, "too long": self.overlong}
        dropped = ", ".join(f"{count} {what}" for what, count in found.items())
        return f"{self.pairs} pairs, {self.cut} of them cut to length; dropped: {dropped}"

    def record(self) -> dict[str, int]:
        return asdict(self)


class Pairs(Sequence[Pair]):
    """Pairs of an Arrow file, all of them or chosen rows; any order of access costs the same."""

    def __init__(self, path: Path, rows: np.ndarray | None = None, *, _file: Any = None) -> None:
        self._path = path
        self._batches = _file or pa.ipc.open_file(pa.memory_map(str(path)))  # readable also once the file has moved
        ends = np.cumsum([self._batches.get_batch(i).num_rows for i in range(self._batches.num_record_batches)])
        self._ends = ends.astype(np.int64)
        self._rows = np.arange(ends[-1] if len(ends) else 0) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, (int, np.integer)):
            return Pairs(self._path, self._rows[index], _file=self._batches)
        batch, row = self._locate(int(index))
        shared, chosen, rejected = (batch[name][row].values.to_numpy() for name in PAIR_SCHEMA.names[2:5])
        return Pair(shared, chosen, rejected, batch["margin"][row].as_py())

    def prompt(self, index: int) -> Text:
        """Text or chat messages."""
        batch, row = self._locate(index)
        return json.loads(batch["prompt"][row].as_py())

    def prompt_hashes(self) -> np.ndarray:
        """int64, of every row; pairs of one prompt have the same."""
        whole = [self._batches.get_batch(i)["prompt_hash"].to_numpy() for i in range(len(self._ends))]
        return (np.concatenate(whole) if whole else np.empty(0, np.int64))[self._rows]

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        row = int(self._rows[index])
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self._batches.get_batch(number), row - (int(self._ends[number - 1]) if number else 0)


def split(pairs: Pairs, heldout: int, *, seed: int) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs, at least `heldout` of these, all pairs of a prompt on one side."""
    hashes = pairs.prompt_hashes()
    prompts, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    order = np.random.default_rng([seed, 0]).permutation(len(prompts))
    enough = int(np.searchsorted(np.cumsum(counts[order]), heldout)) + 1 if heldout else 0
    is_heldout = np.isin(which, order[:enough])
    return pairs[np.flatnonzero(~is_heldout)], pairs[np.flatnonzero(is_heldout)]


def without_prompts_of(pairs: Pairs, others: Pairs) -> Pairs:
    """The pairs whose prompt is not among those of `others`."""
    return pairs[np.flatnonzero(~np.isin(pairs.prompt_hashes(), others.prompt_hashes()))]


def tokenise_pairs(
    source: str,
    cfg: PreferencesConfig,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    pad_id: int | None = None,
) -> PairCounts:
    """Streams every record of `source` into an Arrow file of PAIR_SCHEMA. Raises UserError naming a broken record.

    `pad_id` is the reward model's padding token (left out: the one that a new reward model gets).
    """
    pad_id = padding_id(tokenizer) if pad_id is None else pad_id
    counts = PairCounts()
    rows: list[tuple[Any, ...]] = []

    def flush() -> None:
        columns = [pa.array(values, type=field.type) for values, field in zip(zip(*rows), PAIR_SCHEMA)]
        writer.write_batch(pa.record_batch(columns, schema=PAIR_SCHEMA))
        rows.clear()

    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, PAIR_SCHEMA) as writer:
        for where, record in raw_records(source):
            record = {key: value for key, value in record.items() if value is not None}
            parts, margin = _parts(where, record, cfg), _margin(where, record)
            if _is_empty(parts[1]) or _is_empty(parts[2]):
                counts.empty += 1
                continue
            whole = _tokenise(where, parts, cfg, tokenizer, pad_id)
            if not (whole[0] and whole[1]):
                counts.empty += 1
                continue
            sides = _to_length(*whole, cfg)
            if whole[0] == whole[1]:
                counts.identical += 1
            elif sides is None or sides[0] == sides[1]:  # cutting may leave no difference
                counts.overlong += 1
            else:
                counts.pairs += 1
                counts.cut += sides != whole
                same = _common_length(*sides)
                prompt = as_messages(parts[0], "user") if cfg.format == "chat" else parts[0]
                text = json.dumps(prompt, sort_keys=True)
                asked = text if prompt else json.dumps(parts)  # pairs without a prompt have nothing in common
                digest = int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=8).digest(), signed=True)
                rows.append((text, digest, sides[0][:same], sides[0][same:], sides[1][same:], margin))
            if len(rows) == _ROWS_PER_BATCH:
                flush()
        if rows:
            flush()
    return counts


def raw_records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of every line or row, one at a time. `source` is a .jsonl, .jsonl.gz or .parquet file, or a
    pattern of such names."""
    name = str(Path(source).expanduser())
    paths = [name] if Path(name).is_file() else sorted(glob.glob(name))
    if not paths:
        raise UserError(f"preference data {source}: there is no such file; give a .jsonl, .jsonl.gz or .parquet file")
    for path in paths:
        if path.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif path.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_lines(path)
        else:
            raise UserError(f"preference data {path} must be a .jsonl, .jsonl.gz or .parquet file; convert it")


def _json_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise UserError(f"{path}, line {number}: a record must be a JSON object; mend or remove it")
                    yield f"{path}, line {number}", record
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); mend or remove the line"
        ) from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after line {number} ({error}); restore the file") from None
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        raise UserError(f"{path}, line {number}: not usable JSON ({error}); mend or remove the line") from None


def _parquet_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS_PER_BATCH):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}); restore or convert the file") from None


def _parts(where: str, record: dict[str, Any], cfg: PreferencesConfig) -> tuple[Text, Text, Text]:
    """Prompt, preferred response, other response. Whole dialogues are split before their last message."""
    for key in ("chosen", "rejected"):
        if key not in record:
            raise UserError(
                f"{where}: the record has no `{key}`; it needs `chosen` and `rejected`, and may have `prompt`"
            )
    prompt, chosen, rejected = (record.get(key, "") for key in ("prompt", "chosen", "rejected"))
    for key, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        _check_text(where, key, value, cfg)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(f"{where}: `chosen` and `rejected` must both be text or both be chat messages; mend the record")
    if not isinstance(chosen, str):
        # [user, assistant]: a whole dialogue, whatever `prompt` repeats of it; [assistant]: the response to `prompt`.
        whole = [bool(side) and side[0]["role"] != "assistant" for side in (chosen, rejected)]
        if chosen and rejected and whole[0] != whole[1]:
            raise UserError(f"{where}: one of `chosen` and `rejected` is a whole dialogue, the other is not; mend it")
        if chosen and rejected and whole[0]:
            same = 0
            while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
                same += 1
            return chosen[:same], chosen[same:], rejected[same:]
    elif not prompt:
        first, second = split_hh(chosen), split_hh(rejected)
        if first is not None and second is not None and first[0] == second[0]:
            return first[0], first[1], second[1]
    return prompt, chosen, rejected


def _check_text(where: str, key: str, value: Any, cfg: PreferencesConfig) -> None:
    if isinstance(value, str):
        return
    if cfg.format == "plain" and isinstance(value, list):
        raise UserError(f'{where}: `{key}` is a list of chat messages; set data.format = "chat"')
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        raise UserError(f"{where}: `{key}` must be text, or a list of messages that each have a role and a content")


def _is_empty(response: Text) -> bool:
    return not (response if isinstance(response, str) else "".join(m["content"] for m in response)).strip()


def _margin(where: str, record: dict[str, Any]) -> float:
    margin = record.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not abs(margin) < 1e30:
        raise UserError(f"{where}: `margin` is {margin!r:.40}; it must be a number within 1e30, or be left out")
    return float(margin)


def _tokenise(
    where: str,
    parts: tuple[Text, Text, Text],
    cfg: PreferencesConfig,
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int | None,
) -> tuple[list[int], list[int]]:
    """Both sequences, whole."""
    prompt, *ends = parts
    chat = cfg.format == "chat"
    try:
        first, second = (dialogue_ids(tokenizer, prompt, end, chat=chat, pad_id=pad_id) for end in ends)
    except Exception as error:
        raise UserError(f"{where}: the tokenizer or its chat template refuses the record: {error}") from error
    return first, second


def _to_length(first: list[int], second: list[int], cfg: PreferencesConfig) -> tuple[list[int], list[int]] | None:
    """Both sequences in at most max_tokens, or None if they cannot be cut as the config says."""
    most, longest = cfg.max_tokens, max(len(first), len(second))
    if longest <= most:
        return first, second
    if cfg.overlong == "cut_end":  # the last token stays: there the score is read
        cut = [ids if len(ids) <= most else [*ids[: most - 1], ids[-1]] for ids in (first, second)]
        return cut[0], cut[1]
    excess = longest - most
    if cfg.overlong == "cut_start" and _common_length(first, second) > excess:
        return first[excess:], second[excess:]
    return None


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the beginning that both share, short of the last one of either."""
    most = min(len(first), len(second)) - 1
    return next((i for i in range(most) if first[i] != second[i]), most)
