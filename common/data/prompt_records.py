"""Loads prompts: reads the records of a source, and checks, tokenises and counts them. Runs in the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.config.actors import PromptFormat
from common.data.dialogues import as_messages
from common.data.json_values import without_nan
from common.data.messages import Message, checked_text, column, is_empty, settle_last_message
from common.data.prompt_tokens import bare_ids, check_embedded, rendered, with_beginning, without_end_token
from common.data.records import read_source
from common.errors import UserError
from common.types import PromptRecord

_TOKENISED_AT_ONCE = 256


@dataclass
class PromptCounts:
    """Counts of the prompts of a source that were kept, changed or dropped."""

    prompts: int = 0  # kept
    repeated: int = 0  # kept; an earlier prompt has the same text
    cut: int = 0  # kept, without their first tokens
    empty: int = 0  # dropped: no text, or a message without any
    overlong: int = 0  # dropped

    def __str__(self) -> str:
        repeated = f", {self.repeated} of them repeat an earlier one" if self.repeated else ""
        cut = f", {self.cut} of them cut to length" if self.cut else ""
        return f"{self.prompts} prompts{repeated}{cut}; dropped: {self.empty} empty, {self.overlong} too long"

    @property
    def notable(self) -> bool:
        """True if anything was dropped, cut or repeated."""
        return bool(self.repeated or self.cut or self.empty or self.overlong)


def load_records(
    source: str,
    cfg: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    max_tokens: int,
    vocabulary: int | None = None,
    setting: str = "prompts.train",
    response_setting: str = "sampling.max_new_tokens",
    tools: Sequence[Mapping[str, Any]] = (),
    report: Callable[[str], None] = lambda text: None,
) -> list[PromptRecord]:
    """All prompts of a source, tokenised and checked. Raises UserError that names the faulty record.

    max_tokens: longest prompt that prompts.max_tokens and the model's context allow. vocabulary: rows of the model's
    embedding. response_setting: the setting that bounds the longest response, for messages. tools: schemas of the
    functions that the model may call, for the chat template. report: called with the counts if any prompt was dropped,
    cut or repeated, and if neither chat template nor first prompt names a tool.
    """
    loaded: list[PromptRecord] = []
    counts, texts = PromptCounts(), set()

    def finish(drafts: list[_Draft]) -> None:
        for draft, ids in zip(drafts, _tokenised(drafts, tokenizer), strict=True):
            prompt = _finished(draft, ids, cfg, tokenizer, vocabulary)
            if (length := len(prompt.token_ids)) > max_tokens:
                if cfg.overlong == "refuse":
                    raise UserError(
                        f"{draft.where}: the prompt has {length} tokens, but prompts.max_tokens and the model's "
                        f"context allow {max_tokens}; shorten it, raise prompts.max_tokens, lower "
                        f'{response_setting}, or set prompts.overlong = "drop" or "cut_start"'
                    )
                if cfg.overlong == "drop":
                    counts.overlong += 1
                    continue
                prompt = _without_first_tokens(prompt, tokenizer, max_tokens)
                counts.cut += 1
            loaded.append(prompt)
            texts.add(prompt.text)
        drafts.clear()

    drafts: list[_Draft] = []
    for where, record in read_source(source, setting, seed=seed, reasoning_gym=cfg.reasoning_gym):
        draft = _draft(where, record, cfg, tokenizer, {"tools": list(tools)} if tools else None)
        if draft is None:
            counts.empty += 1
            continue
        if tools and not (drafts or loaded) and not any(tool["function"]["name"] in draft.text for tool in tools):
            report(
                f"{setting}: no tool is named in the first prompt, because the model's chat template ignores tools; "
                "describe them in the prompts, with an example of a call"
            )
        drafts.append(draft)
        if len(drafts) == _TOKENISED_AT_ONCE:
            finish(drafts)
    finish(drafts)
    counts.prompts, counts.repeated = len(loaded), len(loaded) - len(texts)
    if not loaded:
        why = f" ({counts})" if counts.notable else ""
        raise UserError(f"{setting} ({source}) has no usable prompt{why}; it must have at least one")
    if counts.notable:
        report(f"{setting} ({source}): {counts}")
    return loaded


def prompt_record(
    where: str,
    record: dict[str, Any],
    cfg: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary: int | None = None,
    template_options: Mapping[str, Any] | None = None,
    may_be_empty: bool = False,
) -> PromptRecord | None:
    """One record, tokenised and checked; not cut. None if the prompt has no text, or a message without any, unless it
    `may_be_empty`. `template_options`: arguments of the chat template, such as `tools`. Raises UserError whose message
    begins with `where`."""
    draft = _draft(where, record, cfg, tokenizer, template_options, may_be_empty=may_be_empty)
    if draft is None:
        return None
    [ids] = _tokenised([draft], tokenizer)
    return _finished(draft, ids, cfg, tokenizer, vocabulary)


class _Draft(NamedTuple):
    """A prompt that is not tokenised yet."""

    where: str
    text: str
    messages: list[Message] | None
    fields: dict[str, Any]


def _draft(
    where: str,
    record: dict[str, Any],
    cfg: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    template_options: Mapping[str, Any] | None = None,
    *,
    may_be_empty: bool = False,
) -> _Draft | None:
    """A record's prompt as text. None if it is empty."""
    name = cfg.columns.prompt
    prompt = checked_text(where, name, column(where, record, name, cfg, key="prompt"), cfg)
    if is_empty(prompt) and not may_be_empty:
        return None
    fields = without_nan(where, {key: value for key, value in record.items() if key != name})
    if isinstance(prompt, str) and cfg.format == "plain":
        return _Draft(where, prompt, None, fields)
    messages = settle_last_message(where, as_messages(prompt, "user"), cfg)
    if not messages:
        return None
    continues = messages[-1]["role"] == "assistant"
    options = {**(template_options or {}), "continue_final_message": continues, "add_generation_prompt": not continues}
    try:
        text = rendered(tokenizer, messages, **options)
    except Exception as error:
        raise UserError(f"{where}: the tokenizer's chat template refuses the prompt: {error}") from error
    return _Draft(where, text, messages, fields)


def _tokenised(drafts: list[_Draft], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each draft, without special tokens. Raises UserError naming the first draft without any token."""
    try:
        found = bare_ids(tokenizer, [draft.text for draft in drafts])
    except Exception as error:
        if len(drafts) == 1:
            raise UserError(f"{drafts[0].where}: the tokenizer refuses the prompt: {error}") from error
        return [ids for draft in drafts for ids in _tokenised([draft], tokenizer)]
    for draft, ids in zip(drafts, found, strict=True):
        if not ids:
            raise UserError(f"{draft.where}: the prompt has no tokens; add text or remove the record")
    return found


def _finished(
    draft: _Draft, ids: list[int], cfg: PromptFormat, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None
) -> PromptRecord:
    ids = with_beginning(tokenizer, draft.text, ids, chat=draft.messages is not None)
    text, ids = without_end_token(draft.where, tokenizer, draft.text, ids, cfg)
    check_embedded(draft.where, ids, tokenizer, vocabulary)
    return PromptRecord(text, np.asarray(ids, dtype=np.int32), draft.fields, draft.messages)


def _without_first_tokens(prompt: PromptRecord, tokenizer: PreTrainedTokenizerBase, limit: int) -> PromptRecord:
    """The prompt cut to its last tokens; BOS stays at the beginning. The text is decoded from the tokens that remain,
    the messages are not cut."""
    ids = prompt.token_ids
    begin = 1 if ids[0] == tokenizer.bos_token_id and limit > 1 else 0
    ids = np.concatenate([ids[:begin], ids[len(ids) - limit + begin :]])
    # A chat template writes BOS into the text; a tokenizer adds it to the tokens only.
    shown = ids if prompt.messages else ids[begin:]
    return PromptRecord(tokenizer.decode(shown.tolist()), ids, prompt.fields, prompt.messages)
