"""Turns a prompt and a response into the tokens that a reward model reads.

Runs anywhere. The driver prepares training pairs with it and each reward replica serves with it: the tokens must
be the same.
"""

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

    chat: everything goes through the tokenizer's template, and plain text becomes one message of user or assistant.
    Otherwise both must be text; they are joined unchanged and followed by the end token.
    Padding tokens at the end are removed, because transformers reads the score before them. If the end token is also
    the padding token, it is removed too.
    """
    if not chat:
        assert isinstance(prompt, str)
        assert isinstance(response, str)
        return joined_ids(tokenizer, text_ids(tokenizer, prompt), response, pad_id=pad_id)
    messages = as_messages(prompt, "user")
    if not isinstance(response, str) or not messages:
        messages += as_messages(response, "assistant")
        if messages and isinstance(messages[-1].get("content"), str):  # as a text response, which is stripped below
            messages[-1] = {**messages[-1], "content": messages[-1]["content"].strip()}
    elif messages[-1]["role"] == "assistant":  # prompts.last_assistant = "continue": one message
        begun = messages.pop()
        messages.append({**begun, "content": (begun.get("content", "") + response).strip()})
    else:
        # One message, even if the response imitates further turns: only the prompt is split into turns.
        messages.append({"role": "assistant", "content": response.strip()})
    return _without_padding(rendered_ids(tokenizer, rendered(tokenizer, messages)), pad_id)


def joined_ids(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], response: str, *, pad_id: int | None
) -> list[int]:
    """A plain prompt's tokens, the response's, and the end token. Both texts are tokenised separately, as in PPO."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return _without_padding([*prompt_ids, *response_ids, *end], pad_id)


def _without_padding(ids: list[int], pad_id: int | None) -> list[int]:
    while ids and ids[-1] == pad_id:
        ids.pop()
    return ids


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A padding token that is not the end token, so that the score is read at the end token. If there is no other one,
    the end token."""
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        if token is not None and token != tokenizer.eos_token_id:
            return token
    return tokenizer.eos_token_id


def as_messages(text: Dialogue, role: str) -> list[Message]:
    """Chat messages unchanged; a dialogue in HH-RLHF's form as its turns; any other text as one message of `role`."""
    if not isinstance(text, str):
        return [dict(message) for message in text]
    return hh_turns(text) or ([{"role": role, "content": text}] if text else [])


def hh_turns(text: str) -> list[Message]:
    """The turns of a dialogue written `\\n\\nHuman: ...\\n\\nAssistant: ...` (HH-RLHF, arXiv:2204.05862). Empty for
    any other text."""
    before, *rest = _TURN.split(text)
    if before.strip() or not rest:
        return []
    turns: list[Message] = [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(rest[::2], rest[1::2])]
    # A prompt ends with `Assistant:`, which a chat template adds itself.
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def split_hh(text: str) -> tuple[str, str] | None:
    """Splits an HH-RLHF dialogue after its last `Assistant:` into prompt and response. None for any other text."""
    turns = list(_TURN.finditer(text))
    if not turns or turns[-1][1] != "Assistant" or text[: turns[0].start()].strip():
        return None
    end = turns[-1].end()
    return text[:end], text[end:]
