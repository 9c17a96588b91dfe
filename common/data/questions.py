"""The question of a prompt, for people. Runs anywhere."""

from __future__ import annotations

from common.types import Prompt


def question(prompt: Prompt) -> str:
    """The last message of the user, without the chat template."""
    asked = [message["content"] for message in prompt.messages or () if message.get("role") == "user"]
    return str(asked[-1]) if asked else prompt.text
