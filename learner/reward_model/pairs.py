"""Preference pairs: records, once tokenised to an Arrow file, then read from there in any order. Runs anywhere.

The Arrow file is mapped, not loaded: data larger than memory works, and every epoch may have its own full shuffle.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from common.config.reward_model import PreferencesConfig
from common.data.dialogues import as_messages, dialogue_ids, joined_ids, padding_id, split_hh
from common.data.json_values import Record, shown
from common.data.messages import Text, checked_text, column, is_empty, settle_last_message
from common.data.prompt_tokens import check_embedded, text_ids, without_end_token
from common.data.records import read_source
from common.errors import UserError

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
    repeated: int = 0  # kept; an earlier pair has the same prompt and responses
    empty: int = 0  # dropped: a side has no text
    identical: int = 0  # dropped: both sides are the same tokens
    cut: int = 0  # kept, shortened to max_tokens
    overlong: int = 0  # dropped: longer than max_tokens, and not to be cut

    def __str__(self) -> str:
        found = {"empty": self.empty, "identical": self.identical, "too long": self.overlong}
        dropped = ", ".join(f"{count} {what}" for what, count in found.items())
        repeated = f", {self.repeated} of them repeat an earlier one" if self.repeated else ""
        return f"{self.pairs} pairs{repeated}, {self.cut} of them cut to length; dropped: {dropped}"

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
    seed: int = 0,
    vocabulary: int | None = None,
    setting: str = "data.train",
) -> PairCounts:
    """Streams every record of `source` into an Arrow file of PAIR_SCHEMA. Raises UserError naming a broken record.

    pad_id: the reward model's padding token (left out: the one that a new reward model gets). vocabulary: rows of its
    embedding.
    """
    pad_id = padding_id(tokenizer) if pad_id is None else pad_id
    counts = PairCounts()
    rows: list[tuple[Any, ...]] = []
    seen = array("q")  # a digest of each kept pair

    def flush() -> None:
        columns = [pa.array(values, type=field.type) for values, field in zip(zip(*rows), PAIR_SCHEMA)]
        writer.write_batch(pa.record_batch(columns, schema=PAIR_SCHEMA))
        rows.clear()

    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, PAIR_SCHEMA) as writer:
        for where, record in read_source(source, setting, seed=seed):
            parts, margin = _parts(where, record, cfg), _margin(where, record, cfg.columns.margin)
            whole = ([], []) if parts is None else _tokenised(where, parts, cfg, tokenizer, pad_id)
            if parts is None or not (whole[0] and whole[1]):
                counts.empty += 1
                continue
            for ids in whole:
                check_embedded(where, ids, tokenizer, vocabulary)
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
                text, pair = json.dumps(prompt, sort_keys=True), json.dumps(parts)
                asked = _digest(text if prompt else pair)  # pairs without a prompt have nothing in common
                seen.append(_digest(pair))
                rows.append((text, asked, sides[0][:same], sides[0][same:], sides[1][same:], margin))
            if len(rows) == _ROWS_PER_BATCH:
                flush()
        if rows:
            flush()
    counts.repeated = len(seen) - len(np.unique(np.frombuffer(seen, np.int64)))
    return counts


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _parts(where: str, record: Record, cfg: PreferencesConfig) -> tuple[Text, Text, Text] | None:
    """Prompt, preferred response, other response; None if a response or a message of the record is empty. Whole
    dialogues are split before their last message."""
    names = cfg.columns
    given = [
        "" if record.get(names.prompt) is None else record[names.prompt],
        column(where, record, names.chosen, cfg, key="chosen"),
        column(where, record, names.rejected, cfg, key="rejected"),
    ]
    prompt, chosen, rejected = (
        checked_text(where, name, value, cfg)
        for name, value in zip((names.prompt, names.chosen, names.rejected), given)
    )
    if is_empty(chosen) or is_empty(rejected) or (isinstance(prompt, list) and prompt and is_empty(prompt)):
        return None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(
            f"{where}: `{names.chosen}` and `{names.rejected}` must both be text or both be chat messages; fix the "
            "record"
        )
    if not isinstance(chosen, str) and not isinstance(rejected, str):
        # [user, assistant]: a whole dialogue, whatever `prompt` repeats of it; [assistant]: the response to `prompt`.
        whole = [side[0]["role"] != "assistant" for side in (chosen, rejected)]
        if whole[0] != whole[1]:
            raise UserError(
                f"{where}: one of `{names.chosen}` and `{names.rejected}` is a whole dialogue, the other is not; fix "
                "the record"
            )
        if whole[0]:
            same = 0
            while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
                same += 1
            return chosen[:same], chosen[same:], rejected[same:]
    elif isinstance(chosen, str) and isinstance(rejected, str) and not prompt:
        first, second = split_hh(chosen), split_hh(rejected)
        if first is not None and second is not None and first[0] == second[0]:
            return None if is_empty(first[1]) or is_empty(second[1]) else (first[0], first[1], second[1])
    if cfg.format == "chat":
        prompt = settle_last_message(where, as_messages(prompt, "user"), cfg)
    return prompt, chosen, rejected


def _margin(where: str, record: Record, name: str) -> float:
    margin = record.get(name)
    if margin is None or margin == "":
        return 0.0
    with suppress(TypeError, ValueError, OverflowError):
        number = float(margin)  # CSV has text
        if not isinstance(margin, bool) and abs(number) < 1e30:
            return number
    raise UserError(f"{where}: `{name}` is {shown(margin)}; it must be a number within 1e30, or be left out")


def _tokenised(
    where: str,
    parts: tuple[Text, Text, Text],
    cfg: PreferencesConfig,
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int | None,
) -> tuple[list[int], list[int]]:
    """Both sequences, whole."""
    prompt, *ends = parts
    try:
        if cfg.format == "chat":
            first, second = (dialogue_ids(tokenizer, prompt, end, chat=True, pad_id=pad_id) for end in ends)
        else:
            assert isinstance(prompt, str)
            prompt, prompt_ids = without_end_token(where, tokenizer, prompt, text_ids(tokenizer, prompt), cfg)
            first, second = (joined_ids(tokenizer, prompt_ids, str(end), pad_id=pad_id) for end in ends)
    except UserError:
        raise
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
