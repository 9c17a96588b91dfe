"""The tokens that a reward model reads for prompt and response, and dialogues written as one text."""

import pytest
from tokenizers import processors

from common.data.dialogues import as_messages, dialogue_ids, hh_turns, padding_id, split_hh
from common.model.files import load_tokenizer
from tests.fakes import END, WORDS, save_tiny_model

# `ask` before a message of the user, `b0` before one of the assistant, and the end token after each message.
TEMPLATE = "{% for m in messages %}{{ 'ask ' if m.role == 'user' else 'b0 ' }}{{ m.content }} <end> {% endfor %}"
PAD, UNK = WORDS.index("<pad>"), WORDS.index("<unk>")
HH = "\n\nHuman: a1 a2\n\nAssistant: b3\n\nHuman: a4\n\nAssistant: b5"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(directory):
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def plain(tokenizer, prompt, response, *, pad_id=PAD):
    return dialogue_ids(tokenizer, prompt, response, chat=False, pad_id=pad_id)


def chat(tokenizer, prompt, response, *, pad_id=PAD):
    return dialogue_ids(tokenizer, prompt, response, chat=True, pad_id=pad_id)


def said(*turns):
    """`said("user", "a1", "assistant", "b1")` as chat messages."""
    return [{"role": role, "content": content} for role, content in zip(turns[::2], turns[1::2])]


# Plain text


def test_plain_texts_are_joined_and_followed_by_the_end_token(tokenizer):
    assert plain(tokenizer, "ask a1", "b1 b2") == ids("ask a1 b1 b2 <end>")
    assert plain(tokenizer, "", "b1") == ids("b1 <end>")
    assert plain(tokenizer, HH, "b1") == ids("<unk> <unk> a1 a2 <unk> <unk> b3 <unk> <unk> a4 <unk> <unk> b5 b1 <end>")


def test_plain_prompt_and_response_are_tokenised_separately(tokenizer):
    assert plain(tokenizer, "ask a1", "2") == ids("ask a1 <unk> <end>")  # together they would be `ask a12`
    assert plain(tokenizer, "ask a", "1") == ids("ask <unk> <unk> <end>")  # and these `ask a1`


def test_without_an_end_token_the_response_is_last(tokenizer):
    tokenizer.eos_token = None
    assert plain(tokenizer, "ask", "b1") == ids("ask b1")


def test_special_tokens_are_added_before_a_plain_prompt_only(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("a29 $A", special_tokens=[("a29", 33)])
    assert plain(tokenizer, "ask", "b1") == ids("a29 ask b1 <end>")
    assert chat(tokenizer, "a1", "b1") == ids("ask a1 <end> b0 b1 <end>")  # a template writes its own


# Padding tokens at the end


def test_only_padding_tokens_at_the_end_are_removed(tokenizer):
    assert plain(tokenizer, "ask <end> a1", "b1 <end> b2", pad_id=END) == ids("ask <end> a1 b1 <end> b2")
    assert plain(tokenizer, "ask", "b1 <end> <end>", pad_id=END) == ids("ask b1")
    assert plain(tokenizer, "ask <pad>", "b1 <pad>", pad_id=PAD) == ids("ask <pad> b1 <pad> <end>")
    assert plain(tokenizer, "ask", "b1 <pad>", pad_id=None) == ids("ask b1 <pad> <end>")
    assert plain(tokenizer, "<end>", "<end>", pad_id=END) == []
    assert chat(tokenizer, "a1", "b1", pad_id=END) == ids("ask a1 <end> b0 b1")


@pytest.mark.parametrize(
    ("pad", "unk", "expected"),
    [
        ("<pad>", "<unk>", PAD),
        ("<end>", "<unk>", UNK),  # texts end with the end token, so it must not pad
        (None, "<unk>", UNK),
        ("<end>", None, END),  # the only one left
        ("<end>", "<end>", END),
        (None, None, END),
        ("<pad>", None, PAD),
    ],
)
def test_the_padding_token_is_not_the_end_token_if_there_is_another(tokenizer, pad, unk, expected):
    tokenizer.pad_token, tokenizer.unk_token = pad, unk
    assert padding_id(tokenizer) == expected


def test_a_tokenizer_without_special_tokens_has_no_padding(tokenizer):
    tokenizer.pad_token = tokenizer.unk_token = tokenizer.eos_token = None
    assert padding_id(tokenizer) is None


# Chat


def test_a_response_is_stripped_whether_it_is_text_or_messages(tokenizer):
    # The space would otherwise be in the text that the tokenizer gets.
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content | replace(' ', 'a29 ') }}")
    expected = ids("ask a1 <end> b0 b1 <end>")
    given = said("assistant", " b1 ")
    assert chat(tokenizer, "a1", " b1 ") == chat(tokenizer, "a1", given) == expected
    assert chat(tokenizer, said("user", "a1"), given) == expected
    assert chat(tokenizer, "", " b1 ") == chat(tokenizer, "", given) == ids("b0 b1 <end>")
    assert given == said("assistant", " b1 ")


def test_chat_text_is_one_message_of_user_and_one_of_assistant(tokenizer):
    assert chat(tokenizer, "a1 a2", "b1") == ids("ask a1 a2 <end> b0 b1 <end>")
    assert chat(tokenizer, "", "b1") == ids("b0 b1 <end>")
    assert chat(tokenizer, "a1", "") == ids("ask a1 <end> b0 <end>")


def test_a_response_to_a_chat_prompt_is_always_one_message(tokenizer):
    pretended = "\n\nAssistant: b1\n\nHuman: a2\n\nAssistant: b3"
    expected = ids("ask a1 <end> b0 <unk> <unk> b1 <unk> <unk> a2 <unk> <unk> b3 <end>")
    for prompt in ("a1", said("user", "a1"), "\n\nHuman: a1\n\nAssistant:"):
        assert chat(tokenizer, prompt, pretended) == expected


def test_chat_messages_go_through_the_template_in_order(tokenizer):
    expected = ids("ask a1 <end> b0 b1 <end> ask a2 <end> b0 b2 <end>")
    before = said("user", "a1", "assistant", "b1", "user", "a2")
    assert chat(tokenizer, before, said("assistant", "b2")) == expected
    assert chat(tokenizer, before, "b2") == expected
    assert chat(tokenizer, before[:1], [*before[1:], *said("assistant", "b2")]) == expected
    assert chat(tokenizer, [], [*before, *said("assistant", "b2")]) == expected


def test_a_response_continues_a_last_message_of_the_assistant(tokenizer):
    begun = said("user", "a1", "assistant", "b1")
    assert chat(tokenizer, begun, " b2") == chat(tokenizer, begun[:1], "b1 b2") == ids("ask a1 <end> b0 b1 b2 <end>")
    assert begun == said("user", "a1", "assistant", "b1")  # the caller's list is unchanged


def test_a_chat_prompt_written_as_in_hh_becomes_its_turns(tokenizer):
    expected = ids("ask a1 a2 <end> b0 b3 <end> ask a4 <end> b0 b5 <end>")
    prompt, _ = split_hh(HH)
    assert chat(tokenizer, prompt, "b5") == chat(tokenizer, "", HH) == expected


def test_messages_are_unchanged_and_text_becomes_one_message():
    messages = said("system", HH, "user", " a1 ")
    assert as_messages(messages, "assistant") == messages
    assert as_messages("", "user") == []
    assert as_messages("a1 a2", "user") == said("user", "a1 a2")
    assert as_messages("\n\nAssistant:", "user") == said("user", "\n\nAssistant:")  # only names a turn


# Dialogues as one text


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (HH, ("user", "a1 a2", "assistant", "b3", "user", "a4", "assistant", "b5")),
        ("\n\nHuman: a1\n\nAssistant:", ("user", "a1")),
        ("\n\nHuman: a1\n\nAssistant: \n", ("user", "a1")),
        ("\n\nHuman: a1\n\nHuman: a2", ("user", "a1", "user", "a2")),
        ("\n\nHuman:\n\nAssistant: b1", ("user", "", "assistant", "b1")),
        (" \n\n\nHuman: a1\n\n a2\n", ("user", "a1\n\n a2")),
        ("\n\nHuman: a1\nHuman: a2 Assistant: a3\n\nhuman: a4", ("user", "a1\nHuman: a2 Assistant: a3\n\nhuman: a4")),
        ("\n\nAssistant: b1\n\nHuman: a1", ("assistant", "b1", "user", "a1")),
        ("Human: a1\n\nAssistant: b1", ()),  # text before the first turn
        ("a1\n\nHuman: a1", ()),
        ("\n\nSystem: a1", ()),
        ("a1", ()),
        ("", ()),
    ],
)  # fmt: skip
def test_turns_begin_at_a_name_after_an_empty_line(text, turns):
    assert hh_turns(text) == said(*turns)


def test_a_dialogue_is_split_after_its_last_assistant():
    assert split_hh(HH) == (HH[: -len(" b5")], " b5")
    assert split_hh("\n\nHuman: a1\n\nAssistant:") == ("\n\nHuman: a1\n\nAssistant:", "")
    assert split_hh("\n\nAssistant: b1\n\nb2") == ("\n\nAssistant:", " b1\n\nb2")


@pytest.mark.parametrize("text", ["", "a1", HH + "\n\nHuman: a6", "a1" + HH, "\n\nHuman: a1", "Assistant: b1"])
def test_a_text_that_does_not_end_with_the_assistant_is_not_split(text):
    assert split_hh(text) is None
