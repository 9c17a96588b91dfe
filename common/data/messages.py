"""The rules for texts and chat messages, shared by prompts and preference pairs. Runs anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.config.actors import TextFormat
from common.data.json_values import Record, column_name, shown
from common.errors import UserError

Message = dict[str, Any]  # role, content, and further keys for the chat template
Text = str | list[Message]


def column(where: str, record: Record, name: str, cfg: TextFormat, *, key: str) -> Any:
    """The value of a column that every record must have. `key` names the column's setting in `columns`. Raises
    UserError if the record has no such value."""
    value = record.get(name)
    if value is None:
        known = ", ".join(column_name(other) for other in list(record)[:20]) or "none"
        what = "is empty (null)" if name in record else f"does not exist; the record has {known}"
        raise UserError(f"{where}: the column `{name}` {what}; fix the record, or set {cfg.section}.columns.{key}")
    return value


def checked_text(where: str, name: str, value: Any, cfg: TextFormat) -> Text:
    """Returns text, or chat messages whose contents are text. Raises UserError for anything else."""
    if isinstance(value, str):
        _refuse_nul(where, f"`{name}`", value)
        return value
    if not isinstance(value, list):
        raise UserError(
            f"{where}: `{name}` must be text or a list of chat messages, not {shown(value)}; fix the record"
        )
    if cfg.format == "plain":
        raise UserError(f'{where}: `{name}` is a list of chat messages; set {cfg.section}.format = "chat"')
    return [_checked_message(where, f"`{name}`, message {i}", message, cfg) for i, message in enumerate(value, 1)]


def _checked_message(where: str, what: str, message: Any, cfg: TextFormat) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(
            f"{where}: {what} must be an object with `role` and `content`, not {shown(message)}; fix the record"
        )
    # Parquet has null for a missing key.
    message = {key: value for key, value in message.items() if value is not None}
    if message["role"] not in cfg.roles:
        raise UserError(
            f"{where}: {what} has the role {shown(message['role'])}; allowed are {', '.join(cfg.roles)}. Fix the "
            f"record, or add the role to {cfg.section}.roles"
        )
    content = message.get("content")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = message["content"] = "".join(part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise UserError(f"{where}: {what} must have text as `content`, not {shown(content)}; fix the record")
    _refuse_nul(where, what, content)
    return message


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _refuse_nul(where: str, what: str, text: str) -> None:
    if "\0" in text:
        raise UserError(f"{where}: {what} has the character NUL, which is not text; fix or remove the record")


def is_empty(text: Text) -> bool:
    """True if there is no text, no message, or a message without text and tool calls."""
    if isinstance(text, str):
        return not text.strip()
    return not text or any(not message.get("content", "").strip() and not message.get("tool_calls") for message in text)


def settle_last_message(where: str, messages: Sequence[Message], cfg: TextFormat) -> list[Message]:
    """A prompt's messages. If the last one is the assistant's, the setting `last_assistant` decides what happens to it:
    UserError, removal, or no change."""
    prompt = list(messages)
    if not prompt or prompt[-1]["role"] != "assistant" or cfg.last_assistant == "continue":
        return prompt
    if cfg.last_assistant == "refuse":
        raise UserError(
            f"{where}: the prompt ends with a message of the assistant, which may be an answer left in the data. Set "
            f'{cfg.section}.last_assistant = "remove" to get another answer, or "continue" to let the response '
            "continue that message"
        )
    while prompt and prompt[-1]["role"] == "assistant":
        prompt.pop()
    return prompt
