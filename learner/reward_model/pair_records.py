"""Records of preference pairs, tokenised once into the Arrow file of pairs. Runs in the driver."""

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
from learner.reward_model.pairs import PAIR_SCHEMA

_ROWS_PER_BATCH = 1024


@dataclass
class PairCounts:
    """Numbers of pairs kept and dropped while a file was read."""

    pairs: int = 0  # kept
    repeated: int = 0  # kept; an earlier pair has the same prompt and responses
    empty: int = 0  # dropped: a side has no tokens
    identical: int = 0  # dropped: both sides are the same tokens
    cut: int = 0  # kept, shortened to max_tokens
    overlong: int = 0  # dropped: longer than max_tokens, and could not be cut

    def __str__(self) -> str:
        found = {"empty": self.empty, "identical": self.identical, "too long": self.overlong}
        dropped = ", ".join(f"{count} {what}" for what, count in found.items())
        repeated = f", {self.repeated} of them repeat an earlier one" if self.repeated else ""
        return f"{self.pairs} pairs{repeated}, {self.cut} of them cut to length; dropped: {dropped}"

    def record(self) -> dict[str, int]:
        return asdict(self)


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
    """Streams every record of `source` into an Arrow file of PAIR_SCHEMA. Raises UserError that names a broken record.

    pad_id: the reward model's padding token; None: the one that a new reward model gets. vocabulary: number of rows of
    its embedding.
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
            for ids in whole if all(whole) else ():  # pairs with an empty side are only counted
                check_embedded(where, ids, tokenizer, vocabulary)
            sides = _kept_sides(whole, cfg, counts)
            if parts is not None and sides is not None:
                seen.append(_digest(json.dumps(parts)))
                rows.append((*_prompt_columns(parts, cfg), *_token_columns(*sides), margin))
            if len(rows) == _ROWS_PER_BATCH:
                flush()
        if rows:
            flush()
    counts.repeated = len(seen) - len(np.unique(np.frombuffer(seen, np.int64)))
    return counts


def _kept_sides(
    whole: tuple[list[int], list[int]], cfg: PreferencesConfig, counts: PairCounts
) -> tuple[list[int], list[int]] | None:
    """Both sequences cut to length; None if the pair is dropped. Counts the pair either way."""
    sides = _to_length(*whole, cfg)
    if not (whole[0] and whole[1]):
        counts.empty += 1
    elif whole[0] == whole[1]:
        counts.identical += 1
    elif sides is None or sides[0] == sides[1]:  # cutting may remove the difference
        counts.overlong += 1
    else:
        counts.pairs += 1
        counts.cut += sides != whole
        return sides
    return None


def _prompt_columns(parts: tuple[Text, Text, Text], cfg: PreferencesConfig) -> tuple[str, int]:
    """The prompt as JSON, and its hash. Pairs without a prompt have nothing in common, so each has its own hash."""
    prompt = as_messages(parts[0], "user") if cfg.format == "chat" else parts[0]
    text = json.dumps(prompt, sort_keys=True)
    return text, _digest(text if prompt else json.dumps(parts))


def _token_columns(chosen: list[int], rejected: list[int]) -> tuple[list[int], list[int], list[int]]:
    same = _common_length(chosen, rejected)
    return chosen[:same], chosen[same:], rejected[same:]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _parts(where: str, record: Record, cfg: PreferencesConfig) -> tuple[Text, Text, Text] | None:
    """Prompt, preferred response, other response; None if a response or a message of the record is empty.

    Whole dialogues are split before their last message.
    """
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
        # A list that begins with the user is a whole dialogue, and `prompt` is ignored. One that begins with the
        # assistant is the response to `prompt`.
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
    """The pair's margin; 0 if the record has none."""
    margin = record.get(name)
    if margin is None or margin == "":
        return 0.0
    with suppress(TypeError, ValueError, OverflowError):
        number = float(margin)  # CSV values are text
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
    """The tokens of both sequences, before any cut."""
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
    """Both sequences cut to at most max_tokens as `cfg.overlong` says; None if that is impossible."""
    most, longest = cfg.max_tokens, max(len(first), len(second))
    if longest <= most:
        return first, second
    if cfg.overlong == "cut_end":  # keeps the last token, because the score is read there
        cut = [ids if len(ids) <= most else [*ids[: most - 1], ids[-1]] for ids in (first, second)]
        return cut[0], cut[1]
    excess = longest - most
    if cfg.overlong == "cut_start" and _common_length(first, second) > excess:
        return first[excess:], second[excess:]
    return None


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of first tokens that both share. The last token of either is never shared."""
    most = min(len(first), len(second)) - 1
    return next((i for i in range(most) if first[i] != second[i]), most)
