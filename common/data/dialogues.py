"""A prompt and a response as the tokens a reward model reads: one function for its training and for its service."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.data.messages import Message
from common.data.prompt_tokens import rendered, rendered_ids, text_ids

Dialogue = str | Sequence[Mapping[str, Any]]  # text, or chat messages

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def dialogue_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Dialogue, response: Dialogue, *, chat: bool, pad_id: int | None
) -> list[int]:
    """Token ids of prompt and response. The reward model's score is read at the last one.

    chat: all through the tokenizer's template, plain text as one message of user or assistant. Otherwise both must be
    text, which is joined as it is and followed by the end token. Padding tokens at the end are taken away, since
    transformers reads a score before them, even where the end token is one.
    """
    if not chat:
        assert isinstance(prompt, str)
        assert isinstance(response, str)
        return joined_ids(tokenizer, text_ids(tokenizer, prompt), response, pad_id=pad_id)
    messages = as_messages(prompt, "user")
    if not isinstance(response, str) or not messages:
        messages += as_messages(response, "assistant")
    elif messages[-1]["role"] == "assistant":  # prompts.last_assistant = "continue": the response goes on with it
        begun = messages.pop()
        messages.append({**begun, "content": (begun.get("content", "") + response).strip()})
    else:
        # One message, whatever turns it pretends to hold.
        messages.append({"role": "assistant", "content": response.strip()})
    return _without_padding(rendered_ids(tokenizer, rendered(tokenizer, messages)), pad_id)


def joined_ids(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], response: str, *, pad_id: int | None
) -> list[int]:
    """A plain prompt's tokens, then the response's, tokenised apart as in PPO, then the end token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return _without_padding([*prompt_ids, *response_ids, *end], pad_id)


def _without_padding(ids: list[int], pad_id: int | None) -> list[int]:
    while ids and ids[-1] == pad_id:
        ids.pop()
    return ids


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A padding token that no text ends with, so that the score can be read at the end token; else the end token."""
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        if token is not None and token != tokenizer.eos_token_id:
            return token
    return tokenizer.eos_token_id


def as_messages(text: Dialogue, role: str) -> list[Message]:
    """Chat messages as they are; text as one message of `role`; a dialogue as in HH-RLHF as its turns."""
    if not isinstance(text, str):
        return [dict(message) for message in text]
    return hh_turns(text) or ([{"role": role, "content": text}] if text else [])


def hh_turns(text: str) -> list[Message]:
    """The turns of a dialogue written `\\n\\nHuman: ...\\n\\nAssistant: ...` (HH-RLHF, arXiv:2204.05862); none if the
    text is no such dialogue."""
    before, *rest = _TURN.split(text)
    if before.strip() or not rest:
        return []
    turns: list[Message] = [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(rest[::2], rest[1::2])]
    # A prompt ends with `Assistant:`, which a chat template writes by itself.
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def split_hh(text: str) -> tuple[str, str] | None:
    """A dialogue of HH-RLHF as all up to the last `Assistant:`, and the response after it; None if it is none."""
    turns = list(_TURN.finditer(text))
    if not turns or turns[-1][1] != "Assistant" or text[: turns[0].start()].strip():
        return None
    end = turns[-1].end()
    return text[:end], text[end:]
