"""The rules for texts and chat messages, which prompts and pairs share."""

import pytest

from common.config.actors import PromptFormat
from common.config.reward_model import PreferencesConfig
from common.data.messages import checked_text, is_empty, settle_last_message
from common.errors import UserError

CHAT = PromptFormat(format="chat")
USER = {"role": "user", "content": "hello"}


def refusal(value, cfg=CHAT):
    with pytest.raises(UserError) as caught:
        checked_text("p.jsonl, line 3", "question", value, cfg)
    assert str(caught.value).startswith("p.jsonl, line 3: `question`")
    return str(caught.value)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ([], "message 2 must be an object with `role` and `content`, not []"),
        ("hello", "message 2 must be an object with `role` and `content`, not 'hello'"),
        ({"from": "human", "value": "hello"}, "message 2 must be an object with `role` and `content`, not {'from'"),
        ({"role": None, "content": "a"}, "message 2 must be an object with `role`"),
        (
            {"role": "robot", "content": "a"},
            "message 2 has the role 'robot'; allowed are system, developer, user, as",
        ),
        ({"role": "user"}, "message 2 must have text as `content`, not None"),
        ({"role": "user", "content": None}, "message 2 must have text as `content`, not None"),
        ({"role": "user", "content": 7}, "message 2 must have text as `content`, not 7"),
        ({"role": "user", "content": []}, "message 2 must have text as `content`, not []"),
        ({"role": "user", "content": [{"type": "image"}]}, "message 2 must have text as `content`, not [{'type'"),
        ({"role": "user", "content": "a\0"}, "message 2 has the character NUL"),
    ],
)
def test_a_malformed_message_is_refused_with_its_place(message, complaint):
    assert complaint in refusal([USER, message])


def test_nulls_of_parquet_are_missing_keys():
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    from_parquet = [{**USER, "name": None, "tool_calls": None},
                    {"role": "assistant", "content": None, "name": None, "tool_calls": calls}]  # fmt: skip
    expected = [USER, {"role": "assistant", "tool_calls": calls}]
    assert checked_text("here", "prompt", from_parquet, CHAT) == expected
    assert not is_empty(expected)


def test_text_parts_become_one_text():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?", "index": None}]
    found = checked_text("here", "prompt", [{"role": "user", "content": parts}], CHAT)
    assert found == [{"role": "user", "content": "What is this?"}]


def test_the_config_says_which_roles_are_allowed():
    cfg = PreferencesConfig(train="p.jsonl", format="chat", roles=("human", "bot"))
    message = {"role": "bot", "content": "a"}
    assert checked_text("here", "chosen", [message], cfg) == [message]
    assert "allowed are human, bot. Fix the record, or add the role to data.roles" in refusal([USER], cfg)


@pytest.mark.parametrize("section", ["prompts", "data"])
def test_messages_under_format_plain_are_refused_naming_the_setting(section):
    cfg = PromptFormat() if section == "prompts" else PreferencesConfig(train="p.jsonl")
    assert f'is a list of chat messages; set {section}.format = "chat"' in refusal([USER], cfg)


def test_a_message_without_text_and_tool_calls_is_empty():
    assert all(
        is_empty(text) for text in ("", " \n", [], [{"role": "user", "content": "\t"}], [USER, {"role": "user"}])
    )
    assert not any(is_empty(text) for text in ("a", [USER], [{"role": "assistant", "tool_calls": [{}]}]))


def test_all_trailing_messages_of_the_assistant_are_removed():
    said = [USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    remove = PromptFormat(format="chat", last_assistant="remove")
    assert settle_last_message("here", said, remove) == [USER]
    assert settle_last_message("here", said[1:], remove) == settle_last_message("here", [], CHAT) == []
    assert settle_last_message("here", [*said, USER], CHAT) == [*said, USER]
    assert settle_last_message("here", said, PromptFormat(last_assistant="continue")) == said
    with pytest.raises(UserError, match="here: the prompt ends with a message of the assistant"):
        settle_last_message("here", said, CHAT)
