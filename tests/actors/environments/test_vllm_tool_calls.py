"""Calls in the formats of several model families, read by vLLM's parsers."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.environments.tools import ParsedTurn, ToolCall
from common.errors import UserError

SCHEMA = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "x"}, "b": {"type": "integer", "description": "y"}},
            "required": ["a", "b"],
        },
    },
}
XML = (
    "<tool_call>\n<function=add>\n<parameter=a>\n{}\n</parameter>\n<parameter=b>\n{}\n</parameter>\n</function>\n"
    "</tool_call>"
)
FORMATS = {  # parser: how its models write the calls add(1, 2) and add(3, 4)
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n'
    '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>',
    "pythonic": "[add(a=1, b=2), add(a=3, b=4)]",
    "llama3_json": '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}; '
    '{"name": "add", "parameters": {"a": 3, "b": 4}}',
    "qwen3_coder": XML.format(1, 2) + "\n" + XML.format(3, 4),
    "granite": '<|tool_call|>[{"name": "add", "arguments": {"a": 1, "b": 2}}, '
    '{"name": "add", "arguments": {"a": 3, "b": 4}}]',
    "phi4_mini_json": 'functools[{"name": "add", "arguments": {"a": 1, "b": 2}}, '
    '{"name": "add", "arguments": {"a": 3, "b": 4}}]',
}


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "<|python_tag|>": 1, "</s>": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")


@pytest.fixture(scope="module")
def reader(tokenizer):
    """Imports vLLM, which takes four seconds, only when a test runs."""
    from actors.environments.vllm_tool_calls import ToolCallReader

    return lambda parser: ToolCallReader(parser, tokenizer, [SCHEMA])


def test_readers_of_one_model_share_its_vocabulary(reader):
    assert reader("hermes")._tokenizer is reader("pythonic")._tokenizer


@pytest.mark.parametrize("parser", FORMATS)
def test_two_calls_are_found_in_the_format_of(reader, parser):
    calls = reader(parser).read(FORMATS[parser]).calls
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("add", {"a": 1, "b": 2}),
        ("add", {"a": 3, "b": 4}),
    ]


@pytest.mark.parametrize("parser", FORMATS)
def test_text_without_a_call_has_none(reader, parser):
    assert reader(parser).read("The answer is 4.") == ParsedTurn([])


def test_one_reader_reads_the_turns_of_many_episodes(reader):
    xml = reader("qwen3_coder")
    assert [xml.read(XML.format(n, 0)).calls[0].arguments for n in (1, 2)] == ['{"a": 1, "b": 0}', '{"a": 2, "b": 0}']


@pytest.mark.parametrize(
    ("parser", "text", "error"),
    [
        (
            "hermes",
            '<tool_call>{"name": "add", "arguments": {"a": 1,}}</tool_call>',
            "JSONDecodeError: Expecting property",
        ),
        ("hermes", '<tool_call>{"name": "add"}</tool_call>', "KeyError: 'arguments'"),
        ("hermes", "<tool_call>[1]</tool_call>", "TypeError: list indices must be integers"),
        ("pythonic", "[add(a=1, b=c)]", "UnexpectedAstError: Tool call arguments must be literals"),
        ("llama3_json", '{"name": "add"}', "KeyError: 'parameters'"),
    ],
)
def test_the_error_of_a_parser_is_kept_and_not_logged(reader, caplog, parser, text, error):
    turn = reader(parser).read(text)
    assert turn.calls == []
    assert turn.error.startswith(error)
    assert not [record for record in caplog.records if record.exc_info]


def test_wrong_names_and_arguments_are_left_to_the_environment(reader):
    text = '<tool_call>{"name": "sub", "arguments": [1]}</tool_call>'
    assert reader("hermes").read(text) == ParsedTurn([ToolCall("sub", "[1]")])


def test_an_unknown_parser_is_refused(reader):
    with pytest.raises(
        UserError, match=r'environment.tool_parser \("ham"\) is unknown to vLLM; it has apertus, .*hermes'
    ):
        reader("ham")


def test_a_parser_of_another_model_family_is_refused(reader):
    with pytest.raises(UserError, match=r'\("mistral"\) does not fit the model: RuntimeError: .* could not locate'):
        reader("mistral")
