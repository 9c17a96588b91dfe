"""Agents: their requests become the tokens of one rollout, and the answers are what the model wrote."""

import asyncio
import inspect
import json
import sys
import time
import tomllib
from dataclasses import replace
from types import ModuleType
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import openai
import pytest

from actors.environments.environments import Environments
from actors.environments.tool_formats import MAX_READERS, ToolFormats
from actors.environments.tools import ParsedTurn, ToolCall
from common.config.actors import PromptFormat, SamplingConfig
from common.config.environment import EnvironmentConfig
from common.config.ppo import Config
from common.data.prompt_records import prompt_record
from common.data.prompt_tokens import bare_ids
from common.errors import UserError
from common.types import Prompt, Rollout, SampleId, Void
from tests.actors.environments import agents
from tests.actors.environments.templates import CHATML, with_template
from tests.test_docs import ROOT, blocks

CHAT = PromptFormat(format="chat")
MODULE = "tests.actors.environments.agents"
# CHATML, with the tools first and with the calls of assistants.
TOOLS_CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZER = with_template(TOOLS_CHATML)
END = TOKENIZER.eos_token_id
ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ends = []


@pytest.fixture
def hosts():
    """Makes replicas, and closes them at the end."""
    made = []

    def make(agent, *, tokenizer=TOKENIZER, prompts=CHAT, sampling=None, **settings):
        agents.seen.clear()
        ends.clear()
        cfg = EnvironmentConfig(agent=f"{MODULE}:{agent}", **settings)
        options = {"model": tokenizer, "prompts": prompts, "sampling": sampling or SamplingConfig()}
        made.append(Environments("Environments(0)", cfg, end_process=lambda: ends.append(1), **options))
        return made[-1]

    yield make
    for host in made:
        host.close()


def make_prompt(number=0, **fields):
    record = prompt_record("here", {"prompt": "Begin.", **fields}, CHAT, TOKENIZER)
    return Prompt(SampleId(0, number, 0), record.text, record.token_ids, record.fields, record.messages)


def written(rollout, text):
    """The rollout with a turn of the model. One that ends with ... was cut off."""
    cut = text.endswith("...")
    ids = [*bare_ids(TOKENIZER, [text])[0], *([] if cut else [END])]
    return replace(
        rollout,
        response_ids=np.concatenate([rollout.response_ids, np.asarray(ids, np.int32)]),
        rollout_logprobs=np.append(rollout.rollout_logprobs, np.full(len(ids), -0.5, np.float32)),
        policy_versions=np.append(rollout.policy_versions, np.full(len(ids), 3, np.int32)),
        finish_reason="length" if cut else "stop",
    )


async def play(host, prompt, *, model):
    """Plays an episode as the driver does. `model` gets the text of each context, and returns what the model writes.
    Returns the last rollout or void, and the contexts."""
    prompt, _ = await host.begin(prompt)
    if isinstance(prompt, Void):
        return prompt, []
    empty = np.empty(0, np.int32)
    rollout = Rollout(prompt, empty, empty.astype(np.float32), empty, "", "Generator(0)")
    contexts = []
    while True:
        contexts.append(TOKENIZER.decode(rollout.context_ids.tolist()))
        text = model(contexts[-1])
        text = await text if inspect.isawaitable(text) else text
        rollout, ref, _ = await host.step(written(rollout, text))
        if isinstance(ref, Void):
            return ref, contexts
        if ref.finished:
            return rollout, contexts


def run(work):
    return asyncio.run(asyncio.wait_for(work, 60))


def episode(host, prompt=None, *, model=lambda context: "Yes."):
    return run(play(host, prompt or make_prompt(), model=model))


def said(*texts):
    """A model that writes these texts, one a turn."""
    left = list(texts)
    return lambda context: left.pop(0)


def score_of(rollout):
    return [turn.reward for turn in rollout.turns]


# Tokens


def test_a_conversation_is_one_sequence_of_what_both_said(hosts):
    rollout, contexts = episode(hosts("twice"), model=said("One", "Two..."))
    begun = ASKED.format("Begin.")
    assert contexts == [begun, begun + "One<|im_end|>\n" + ASKED.format("And?")]
    assert TOKENIZER.decode(rollout.response_ids) == "One<|im_end|>\n" + ASKED.format("And?") + "Two..."
    assert TOKENIZER.decode(rollout.sampled_ids) == "One<|im_end|>Two..."
    assert (rollout.finish_reason, score_of(rollout)) == ("terminated", [0.0, 6.0])
    assert [(turn.new_context, turn.ends) for turn in rollout.turns] == [(False, False), (False, False)]
    first, second = agents.seen
    assert (first.choices[0].message.content, second.choices[0].message.content) == ("One", "Two...")
    assert (first.choices[0].finish_reason, second.choices[0].finish_reason) == ("stop", "length")
    lengths = [len(bare_ids(TOKENIZER, [text])[0]) for text in (begun, "One<|im_end|>", contexts[1], "Two...")]
    usages = [(done.usage.prompt_tokens, done.usage.completion_tokens) for done in (first, second)]
    assert usages == [tuple(lengths[:2]), tuple(lengths[2:])]
    assert first.usage.total_tokens == sum(lengths[:2])


@pytest.mark.parametrize(
    ("asked", "contexts", "kinds"),
    [
        # Another conversation: nothing of the first one is seen.
        ([["A"], ["B"]], [("A",), ("B",)], [(True, True)]),
        # The same prompt again.
        ([["A"], ["A"]], [("A",), ("A",)], [(True, True)]),
        # Back to the first conversation, after the second one.
        ([["A"], ["B"], ["A", "$0", "C"]], [("A",), ("B",), ("A", "0", "C")], [(True, True), (True, True)]),
        # Another continuation of the first answer.
        (
            [["A"], ["A", "$0", "B"], ["A", "$0", "C"]],
            [("A",), ("A", "0", "B"), ("A", "0", "C")],
            [(False, False), (True, True)],
        ),
        # An answer that the model did not give in this conversation.
        ([["A"], ["B"], ["A", "$1", "C"]], [("A",), ("B",), ("A", "1", "C")], [(True, True), (True, True)]),
    ],
)
def test_a_request_continues_a_conversation_of_the_episode_or_begins_another(hosts, asked, contexts, kinds):
    rollout, seen = episode(hosts("asks"), make_prompt(ask=asked), model=said("0", "1", "2"))

    def text(messages):
        shown = [
            f"<|im_start|>assistant\n{text}<|im_end|>\n" if text.isdigit() else f"<|im_start|>user\n{text}<|im_end|>\n"
            for text in messages
        ]
        return "".join(shown) + "<|im_start|>assistant\n"

    assert seen == [text(messages) for messages in contexts]
    assert [(turn.new_context, turn.ends) for turn in rollout.turns[:-1]] == kinds
    assert score_of(rollout) == [0.0] * len(kinds) + [1.0]
    assert TOKENIZER.decode(rollout.sampled_ids) == "".join(f"{i}<|im_end|>" for i in range(len(asked)))


def test_tokens_of_an_earlier_conversation_are_not_encoded_again(hosts):
    """The model wrote "ab" in two tokens, which the tokenizer would write in one."""
    ids = [*(TOKENIZER.convert_tokens_to_ids(letter) for letter in "ab"), END]
    assert bare_ids(TOKENIZER, ["ab"])[0] != ids[:2]

    async def steps():
        host = hosts("asks")
        prompt, _ = await host.begin(make_prompt(ask=[["A"], ["B"], ["A", "$0", "C"]]))
        empty = np.empty(0, np.int32)
        rollout = Rollout(prompt, np.asarray(ids, np.int32), np.zeros(3, np.float32), empty, "stop", "G")
        rollout, _, _ = await host.step(rollout)
        rollout, _, _ = await host.step(written(rollout, "1"))
        await host.end(prompt.sample_id)
        return rollout.context_ids.tolist(), prompt.token_ids.tolist()

    context, prompt_ids = run(steps())
    assert context[: len(prompt_ids) + 3] == [*prompt_ids, *ids]
    assert TOKENIZER.decode(context) == ASKED.format("A") + "ab<|im_end|>\n" + ASKED.format("C")


def test_with_turns_as_sequences_each_request_is_written_by_the_template(hosts):
    asked = [["A"], ["A", "$0", "B"], ["C"]]
    rollout, seen = episode(hosts("asks", sequence="turn"), make_prompt(ask=asked), model=said("0", "1", "2"))
    assert seen[1] == ASKED.format("A") + "0<|im_end|>\n" + ASKED.format("B")
    assert [(turn.new_context, turn.ends) for turn in rollout.turns] == [(True, False), (True, True), (False, False)]


def test_special_tokens_are_in_the_tokens_and_not_in_the_answer(hosts):
    special = TOKENIZER.decode([TOKENIZER.convert_tokens_to_ids("[INST]")])
    rollout, contexts = episode(hosts("twice"), model=said(f"a{special}b", "c"))
    assert agents.seen[0].choices[0].message.content == "ab"
    assert contexts[1].startswith(contexts[0] + f"a{special}b<|im_end|>")
    assert rollout.turns[0].new_context is False


# Tools

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


def test_calls_are_read_and_the_conversation_continues(hosts):
    rollout, contexts = episode(hosts("calling"), model=said(f"I add.\n{CALL}\n{CALL}", CALL, "It is 3."))
    first, second, third = (done.choices[0] for done in agents.seen)
    assert [first.finish_reason, second.finish_reason, third.finish_reason] == ["tool_calls", "tool_calls", "stop"]
    assert first.message.content.strip() == "I add."
    assert [(call.id, call.function.name) for call in first.message.tool_calls] == [
        ("call00000", "add"),
        ("call00001", "add"),
    ]
    assert json.loads(first.message.tool_calls[0].function.arguments) == {"a": 1, "b": 2}
    assert (second.message.content, second.message.tool_calls[0].id) == (None, "call01000")
    assert (third.message.content, third.message.tool_calls) == ("It is 3.", None)
    assert contexts[0].startswith("<|im_start|>system\n[{")
    result = '<|im_start|>tool\n{"a": 1, "b": 2}<|im_end|>\n'
    assert contexts[1] == f"{contexts[0]}I add.\n{CALL}\n{CALL}<|im_end|>\n{result}{result}<|im_start|>assistant\n"
    assert not any(turn.new_context for turn in rollout.turns)


def test_other_tools_begin_another_sequence(hosts):
    async def agent(prompt, endpoint):
        messages = [*prompt.messages]
        messages += [(await agents.ask(endpoint, messages)).model_dump(), agents.user("And?")]
        await agents.ask(endpoint, messages, tools=agents.TOOLS)
        return 1.0

    agents.with_other_tools = agent
    rollout, contexts = episode(hosts("with_other_tools"), model=said("No.", "Yes."))
    del agents.with_other_tools
    assert (rollout.turns[0].new_context, rollout.turns[0].ends) == (True, True)
    assert contexts[1].startswith("<|im_start|>system\n[{")
    assert contexts[1].endswith(ASKED.format("Begin.") + "No.<|im_end|>\n" + ASKED.format("And?"))


def test_tools_that_the_model_cannot_get_are_refused(hosts):
    host = hosts("refused", tool_parser="ham")
    rollout, _ = episode(host, make_prompt(request={"tools": agents.TOOLS}))
    error = agents.seen[0]
    assert error.status_code == 400
    assert error.body["message"].startswith('environment.tool_parser ("ham") is unknown to vLLM')
    assert score_of(rollout) == [1.0]


@pytest.mark.parametrize("sequence", ["episode", "turn"])
def test_the_model_may_write_the_character_nul(hosts, sequence):
    rollout, contexts = episode(hosts("twice", sequence=sequence), model=said("a\0b", "c"))
    assert [done.choices[0].message.content for done in agents.seen] == ["a\0b", "c"]
    assert contexts[1].endswith("a\0b<|im_end|>\n" + ASKED.format("And?"))
    assert score_of(rollout) == [0.0, 1.0]


@pytest.mark.parametrize(
    "said_before",
    [
        [{"role": "assistant", "content": ""}, {"role": "tool", "content": ""}],
        [{"role": "assistant", "content": ""}, {"role": "user", "content": "\n"}],
    ],
)
def test_messages_of_the_first_request_may_be_empty(hosts, said_before):
    request = {"messages": [{"role": "system", "content": " "}, {"role": "user", "content": "Hi."}, *said_before]}
    rollout, [context] = episode(hosts("refused"), make_prompt(request=request))
    assert agents.seen == [None]  # it was answered
    parts = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in request["messages"]]
    assert context == "".join(parts) + "<|im_start|>assistant\n"
    assert score_of(rollout) == [1.0]


class MadeReader:
    """Finds one call in every text but the last one."""

    def __init__(self, arguments):
        self.call = ToolCall("add", arguments)

    def read(self, text):
        return ParsedTurn([self.call] if "call" in text else [])


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": "\\ud83d"}',  # half of a surrogate pair
        '{"a": ' + "[" * 99 + "]" * 99 + "}",  # nested deeper than a message may be
        '{"a": ' + "9" * 4290 + "}",  # more digits than a message may have
        '{"a": ',
    ],
)
@pytest.mark.parametrize("sequence", ["episode", "turn"])
def test_no_arguments_of_the_model_void_an_episode(hosts, sequence, arguments, monkeypatch):
    monkeypatch.setattr(ToolFormats, "read", lambda self, reader, text: reader.read(text))
    monkeypatch.setattr(ToolFormats, "prepare", lambda self, tools: asyncio.sleep(0, MadeReader(arguments)))
    host = hosts("calling", sequence=sequence, max_tokens=100_000)
    rollout, contexts = episode(host, model=said("call", "No."))
    assert score_of(rollout) == [0.0, 1.0]
    [call] = agents.seen[0].choices[0].message.tool_calls
    assert call.function.arguments == arguments
    assert f"<|im_start|>tool\n{arguments}<|im_end|>" in contexts[1]


# HTTP


def test_a_streamed_answer_has_the_same_parts(hosts):
    rollout, _ = episode(hosts("streaming"), model=said("Hello there"))
    chunks = agents.seen
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello there"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == len(rollout.response_ids)
    assert {(chunk.object, chunk.model) for chunk in chunks} == {("chat.completion.chunk", "policy")}


def test_streamed_calls_can_be_put_together():
    from actors.environments.chat_answers import ChatAnswer, events

    call = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    body = events(ChatAnswer("chatcmpl-0", "", [call], "tool_calls"), include_usage=False).decode()
    *lines, last, rest = body.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert [choice["delta"] for choice in deltas] == [
        {"role": "assistant", "content": ""},
        {"tool_calls": [{"index": 0, **call}]},
        {},
    ]
    assert deltas[-1]["finish_reason"] == "tool_calls"


def test_the_endpoint_lists_its_model_and_refuses_other_keys_and_paths(hosts):
    episode(hosts("lists"))
    models, model, embeddings, list_without_key, ask_without_key = agents.seen[:5]
    assert (models, model) == (["policy"], "policy")
    assert isinstance(embeddings, openai.NotFoundError)
    assert embeddings.body["message"].startswith("POST /v1/embeddings does not exist here; the endpoint has POST /v1/c")
    for error in (list_without_key, ask_without_key):
        assert isinstance(error, openai.AuthenticationError)
        assert error.body["code"] == "invalid_api_key"


REFUSALS = [
    ({"n": 2}, "n", "n (2) is not supported by this endpoint, which has only 1; leave it out"),
    ({"logprobs": True}, "logprobs", "logprobs (True) is not supported by this endpoint, which has only False; leave"),
    ({"response_format": {"type": "json_object"}}, "response_format", "response_format ("),
    ({"stop": ["\n"]}, "stop", "must be sampling.stop of the run (['END']), which samples every answer; leave it out"),
    ({"temperature": 0.2}, "temperature", "temperature (0.2) must be sampling.temperature of the run (0.7), which"),
    ({"top_p": 0.5}, "top_p", "top_p (0.5) must be sampling.top_p of the run (1.0)"),
    ({"verbosity": "low"}, "verbosity", "verbosity ('low') is not supported by this endpoint, which has only 'medium'"),
    ({"seed": 3}, "seed", "seed (3) is not supported by this endpoint; leave it out"),
    ({"max_tokens": 5}, "max_tokens", "max_tokens (5) must not be below sampling.max_new_tokens (64) of the run"),
    ({"tool_choice": "required", "tools": agents.TOOLS}, "tool_choice", "tool_choice ('required') is not supported"),
    ({"frequency_penalty": 0.1}, "frequency_penalty", "frequency_penalty (0.1) is not supported by this endpoint"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "reasoning_effort ('low') is not supported by this endpoint"),
    ({"extra_body": {"guided_regex": "a"}}, "guided_regex", "guided_regex ('a') is not supported by this endpoint"),
    ({"messages": []}, "messages", "messages ([]) must be a list of at least one message"),
    ({"messages": [{"role": "assistant", "content": "I"}]}, "messages", "messages[0] is the assistant's, but the mode"),
    ({"messages": [{"role": "clown", "content": "I"}]}, "messages", "messages[0] has the role 'clown'; it must be one"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        "messages",
        "messages[0] has the content",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools", "other kinds of tools are not supported"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
        "tools",
        "tools: parameters ('x') of the function f must be an object (a JSON schema); correct it, or leave it out",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "description": 3}}]},
        "tools",
        "tools: description (3) of the function f must be text; correct it, or leave it out",
    ),
    ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages", "messages[0] has the character NUL, which is"),
]


@pytest.mark.parametrize(("request_", "param", "message"), REFUSALS)
def test_what_the_endpoint_cannot_do_is_refused_by_name(hosts, request_, param, message):
    sampling = SamplingConfig(temperature=0.7, max_new_tokens=64, stop=("END",))
    rollout, contexts = episode(hosts("refused", sampling=sampling), make_prompt(request=request_))
    error = agents.seen[0]
    assert isinstance(error, openai.BadRequestError)
    assert message in error.body["message"]
    assert (error.body["param"], error.body["type"]) == (param, "invalid_request_error")
    assert len(contexts) == 1  # of the good request after it
    assert score_of(rollout) == [1.0]


def test_another_model_does_not_exist(hosts):
    episode(hosts("refused"), make_prompt(request={"model": "gpt-4o"}))
    assert isinstance(agents.seen[0], openai.NotFoundError)
    assert "model ('gpt-4o') must be 'policy'" in agents.seen[0].body["message"]


def test_the_settings_of_the_run_and_neutral_ones_are_accepted(hosts):
    request = {
        **{"temperature": 0.7, "top_p": 1, "max_tokens": 64, "max_completion_tokens": 100, "n": 1, "stop": "END"},
        **{"logprobs": False, "response_format": {"type": "text"}, "presence_penalty": 0, "user": "me"},
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "k"}]}
        ],
    }
    sampling = SamplingConfig(temperature=0.7, max_new_tokens=64, stop=("END",))
    _, contexts = episode(hosts("refused", sampling=sampling), make_prompt(request=request))
    assert agents.seen == [None]
    assert contexts == ["<|im_start|>system\nBe k<|im_end|>\n<|im_start|>assistant\n"]


def test_requests_at_once_are_answered_one_after_another(hosts):
    texts = [f"Say {i}." for i in range(5)]
    rollout, contexts = episode(
        hosts("at_once"), make_prompt(texts=texts), model=lambda context: context.split("Say ")[1][0]
    )
    assert sorted(contexts) == [ASKED.format(text) for text in texts]
    assert agents.seen[-1] == ["0", "1", "2", "3", "4"]
    assert [turn.ends for turn in rollout.turns] == [True, True, True, True, False]


def test_many_episodes_at_once_get_their_own_answers(hosts):
    host = hosts("scored", concurrent=40)

    async def all_of_them():
        return await asyncio.gather(
            *(play(host, make_prompt(i, score=float(i)), model=lambda context, i=i: f"I am {i}.") for i in range(40))
        )

    played = run(all_of_them())
    assert [score_of(rollout) for rollout, _ in played] == [[float(i)] for i in range(40)]
    assert [TOKENIZER.decode(rollout.response_ids) for rollout, _ in played] == [
        f"I am {i}.<|im_end|>" for i in range(40)
    ]


def test_a_request_whose_client_left_is_not_answered(hosts):
    host = hosts("gives_up")

    async def model(context):
        if "Two." in context:
            agents.seen.append("two")
            waiting = host._episodes[SampleId(0, 0, 0)]._object._waiting
            while not waiting:
                await asyncio.sleep(0.01)
            agents.seen.append("queued")
            while not waiting[0].answer.cancelled():
                await asyncio.sleep(0.01)
        return "Yes."

    _, contexts = episode(host, model=model)
    assert contexts == [ASKED.format(text) for text in ("One.", "Two.", "Four.")]


# The score


@pytest.mark.parametrize(
    ("score", "info"), [(0.25, {}), (3, {}), ({"score": -1.5, "info": {"tests": 3}}, {"tests": 3})]
)
def test_the_score_is_the_reward_of_the_last_turn(hosts, score, info):
    rollout, _ = episode(hosts("scored"), make_prompt(score=score))
    assert score_of(rollout) == [float(score["score"] if info else score)]
    assert json.loads(rollout.turns[-1].info) == info


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        ("high", "the agent returned the score 'high' (str); return the score, a number, or a mapping with score and"),
        (True, "the agent returned the score True (bool); return the score"),
        (None, "the agent returned the score None; return the score"),
        ({"reward": 1.0}, "the agent returned the key 'reward'; return the score"),
        ({"info": {}}, "the agent returned the score None; return the score"),
        (1e300, "the agent returned the score 1e+300; it must be finite and fit float32"),
        ({"score": 1, "info": [1]}, "the agent returned the info a list; it must be a dict"),
    ],
)
def test_a_score_that_is_none_voids_the_episode(hosts, score, reason):
    void, _ = episode(hosts("scored"), make_prompt(score=score))
    assert f"environment {MODULE}:scored: {reason}" in void.reason


def test_a_plain_function_and_a_callable_object_are_agents_too(hosts):
    rollout, _ = episode(hosts("plain"), model=said("Hm."))
    assert (score_of(rollout), json.loads(rollout.turns[0].info)) == ([2.0], {"said": "Hm."})
    rollout, _ = episode(hosts("instance"), make_prompt(score=4))
    assert score_of(rollout) == [4.0]


# Failures


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ([["One.", "No."]], "the agent sent a prompt that cannot be used"),
        ([["One."], ["Two.", "No."]], "the chat template refuses what the agent sent"),
    ],
)
def test_messages_that_the_template_refuses_are_called_the_agents(hosts, asked, reason):
    refuse = "{% for message in messages %}{% if message.content == 'No.' %}{{ raise_exception('no') }}{% endif %}"
    host = hosts("asks", tokenizer=with_template(refuse + "{% endfor %}" + CHATML))
    void, _ = episode(host, make_prompt(ask=asked))
    assert void.reason.startswith(f"environment {MODULE}:asks: {reason}: ")


def test_a_reader_is_made_once_for_each_of_the_newest_lists_of_tools():
    made = []

    def make(tools):
        made.append(tools[0]["number"])
        if made[-1] == 1:
            raise UserError("no such tools")
        return f"reader {made[-1]}"

    async def prepare(numbers):
        formats, found = ToolFormats(TOKENIZER, make), []
        for number in numbers:
            try:
                found.append(await formats.prepare([{"number": number}]))
            except UserError as error:
                found.append(str(error))
        return found, await formats.prepare([]), len(formats._readers)

    lists = [*range(MAX_READERS), 0, MAX_READERS, 0, 1]  # the new one drops 1, which was used least recently
    found, none, kept = run(prepare(lists))
    assert found == ["no such tools" if number == 1 else f"reader {number}" for number in lists]
    assert made == [*range(MAX_READERS), MAX_READERS, 1]
    assert none is None
    assert kept == MAX_READERS


@pytest.mark.parametrize(
    ("agent", "reason", "last_line"),
    [
        ("raises", "the agent raised ZeroDivisionError: oh (agents.py, line ", "ZeroDivisionError: oh"),
        ("raises_at_once", "the agent raised ZeroDivisionError: oh (agents.py, line ", "ZeroDivisionError: oh"),
        ("exits", "the agent raised SystemExit: 3 (agents.py, line ", "SystemExit: 3"),
        ("without_request", "the agent returned without a request to the model", None),
        ("cancels", "the agent was cancelled", None),
        ("hangs", "the agent, until its next request, took longer than environment.step_timeout_s (0.5 s)", None),
        ("hangs_at_once", "the agent, until its first request, took longer than environment.step_timeout_s", None),
    ],
)
def test_a_failure_voids_the_episode_with_its_reason(hosts, agent, reason, last_line):
    limits = {"step_timeout_s": 0.5} if "hangs" in agent else {}
    void, _ = episode(hosts(agent, **limits))
    assert void.reason.startswith(f"environment {MODULE}:{agent}: {reason}")
    if last_line:
        lines = void.error.traceback.splitlines()
        assert "agents.py" in lines[1]
        assert lines[-1] == last_line
        assert void.kind == "raised"
    assert agents.seen[1:] == (["cancelled"] if agent == "hangs" else [])


def test_the_server_answers_while_an_agent_blocks_the_loop_of_all_agents(hosts):
    host = hosts("blocks", step_timeout_s=1, timeout_s=60)

    async def steps():
        prompt, _ = await host.begin(make_prompt())
        url = f"{host._episodes[prompt.sample_id]._object._endpoint.base_url}/models"
        empty = np.empty(0, np.int32)
        begun = Rollout(prompt, empty, empty.astype(np.float32), empty, "", "Generator(0)")
        step = asyncio.create_task(host.step(written(begun, "Yes.")))
        while agents.seen[-1:] != ["blocks"]:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        with pytest.raises(HTTPError) as caught:
            await asyncio.to_thread(urlopen, url, timeout=10)
        assert caught.value.code == 401
        assert time.monotonic() - started < 1
        assert agents.seen[-1] == "blocks"
        _, void, _ = await step
        while not ends:
            await asyncio.sleep(0.01)
        return void

    assert "took longer than environment.step_timeout_s (1 s)" in run(steps()).reason
    assert ends == [1]  # the process is replaced


@pytest.mark.parametrize(
    ("limits", "fields", "limit", "turns"),
    [
        ({"max_turns": 3}, {}, "max_turns", 3),
        ({"max_tokens": 100}, {"words": 45}, "max_tokens", 2),
    ],
)
def test_at_a_limit_the_agent_may_still_return_a_score(hosts, limits, fields, limit, turns):
    rollout, _ = episode(hosts("endless", **limits), make_prompt(catches=True, **fields))
    assert rollout.finish_reason == limit
    assert score_of(rollout) == [0.0] * (turns - 1) + [float(turns)]
    assert rollout.turns[-1].end == rollout.turns[-1].next_start == len(rollout.response_ids)
    error = agents.seen[-1]
    if limit == "max_turns":
        message = "the episode has reached environment.max_turns (3); the model is not asked again"
        assert (error.status_code, error.body["code"], error.body["message"]) == (400, limit, message)
    else:
        assert (error.status_code, error.body["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(("limit", "fields"), [("max_turns", {}), ("max_tokens", {"words": 45})])
def test_an_agent_without_a_score_at_a_limit_is_void(hosts, limit, fields):
    most = {"max_turns": 2, "max_tokens": 100}[limit]
    void, _ = episode(hosts("endless", **{limit: most}), make_prompt(catches=False, **fields))
    reason = f"a request was refused, because the episode has reached environment.{limit} ({most}), and the agent r"
    assert reason in void.reason
    assert void.reason.endswith("let the agent return a score then, or raise the limit")
    assert void.error.fault.endswith(f"the agent returned no score after environment.{limit}")


def num_tokens(text):
    return len(bare_ids(TOKENIZER, [text])[0])


SHORT, LONG = "Short.", "long " * 30


def test_a_first_request_that_is_too_long_is_refused_and_a_shorter_one_answered(hosts):
    most = num_tokens(ASKED.format(LONG)) - 1
    host = hosts("insists", prompts=CHAT.model_copy(update={"max_tokens": most}))
    rollout, contexts = episode(host, make_prompt(texts=[LONG, LONG, SHORT]))
    assert contexts == [ASKED.format(SHORT)]
    assert (rollout.finish_reason, score_of(rollout)) == ("terminated", [1.0])
    assert rollout.prompt.messages == [agents.user(SHORT)]
    for error in agents.seen[:2]:
        assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", "messages")
        assert error.code == "context_length_exceeded"
        assert error.body["message"] == (
            f"the maximum context length is exceeded: the messages have {most + 1} tokens, but prompts.max_tokens and "
            f"the model's context allow {most}; send fewer or shorter messages"
        )


def test_an_agent_whose_requests_are_all_too_long_has_nothing_to_learn_from(hosts):
    prompts = CHAT.model_copy(update={"max_tokens": 20})
    void, contexts = episode(hosts("insists", prompts=prompts), make_prompt(texts=[LONG]))
    assert contexts == []
    most = num_tokens(ASKED.format(LONG))
    assert (
        f"its last one was too long ({most} tokens, where prompts.max_tokens and the model's context allow 20): le"
        in (void.reason)
    )
    void, _ = episode(hosts("insists", prompts=prompts), make_prompt(texts=[LONG], raises=True))
    assert "the agent raised BadRequestError: Error code: 400" in void.reason
    assert void.kind == "raised"


@pytest.mark.parametrize("sequence", ["episode", "turn"])
def test_a_later_request_that_is_too_long_is_refused_and_a_shorter_one_answered(hosts, sequence):
    answer, short, long = (num_tokens(text) for text in ("Yes.<|im_end|>", ASKED.format("Go."), ASKED.format(LONG)))
    most = answer + long  # of which the long request would leave nothing for an answer
    host = hosts("insists", max_tokens=most, sequence=sequence)
    rollout, contexts = episode(host, make_prompt(texts=[SHORT, LONG, "Go.", LONG]))
    assert contexts == [ASKED.format(SHORT), ASKED.format("Go.")]
    assert [turn.ends for turn in rollout.turns] == [True, False]
    assert TOKENIZER.decode(rollout.response_ids) == "Yes.<|im_end|>" + ASKED.format("Go.") + "Yes.<|im_end|>"
    # The last request was refused, so the limit ended the episode.
    assert (rollout.finish_reason, score_of(rollout)) == ("max_tokens", [0.0, 2.0])
    errors = [found for found in agents.seen if isinstance(found, openai.BadRequestError)]
    assert [error.code for error in errors] == ["context_length_exceeded"] * 2
    rooms = [long - 1, long - 1 - short - answer]
    assert [error.body["message"] for error in errors] == [
        f"the maximum context length is exceeded: the request adds {long} tokens to the episode, which has room for "
        f"{room} before environment.max_tokens ({most}); send fewer or shorter messages, in another conversation"
        for room in rooms
    ]


def test_an_agent_that_returns_after_a_shorter_request_has_terminated(hosts):
    host = hosts("insists", max_tokens=num_tokens("Yes.<|im_end|>") + num_tokens(ASKED.format(LONG)))
    rollout, _ = episode(host, make_prompt(texts=[SHORT, LONG, "Go."]))
    assert (rollout.finish_reason, score_of(rollout)) == ("terminated", [0.0, 2.0])


def test_requests_after_the_end_of_the_agent_are_refused(hosts):
    host = hosts("leaves_a_request")

    async def model(context):
        if "Open." in context:
            agents.seen.append("open")
            task = host._episodes[SampleId(0, 0, 0)]._object._task
            while not task.done():  # the agent returns meanwhile
                await asyncio.sleep(0.01)
        return "Yes."

    async def steps():
        rollout, contexts = await play(host, make_prompt(), model=model)
        while not isinstance(agents.seen[-1], openai.APIStatusError):
            await asyncio.sleep(0.01)
        return rollout, contexts

    rollout, contexts = run(steps())
    assert contexts == [ASKED.format("Begin."), ASKED.format("Open.")]
    assert (rollout.finish_reason, score_of(rollout)) == ("terminated", [0.0, 4.0])
    assert isinstance(agents.seen[-1], openai.AuthenticationError)
    assert "make no request after the agent has returned" in agents.seen[-1].body["message"]


def test_closing_an_episode_cancels_the_agent(hosts):
    async def steps():
        host = hosts("hangs")
        prompt, _ = await host.begin(make_prompt())
        episode = host._episodes[prompt.sample_id]._object
        await host.end(prompt.sample_id)
        return episode

    episode = run(steps())
    assert episode._task.cancelled()
    assert episode._server._episodes == {}


def test_closing_an_episode_refuses_the_open_request_of_a_plain_function(hosts):
    async def steps():
        host = hosts("plain_catches")
        prompt, _ = await host.begin(make_prompt())
        await host.end(prompt.sample_id)
        while not agents.seen:
            await asyncio.sleep(0.01)

    run(steps())
    assert (agents.seen[0].status_code, agents.seen[0].body["message"]) == (400, "the episode is over")


# The docs


@pytest.mark.parametrize(
    ("answers", "score", "reason"),
    [
        (["4"], 1.0, "terminated"),
        (["5", " 4 "], 1.0, "terminated"),
        (["5", "6", "7"], 0.0, "terminated"),
        (["5", "word " * 200], 0.0, "max_tokens"),
    ],
)
def test_the_agent_of_the_docs_solves_what_the_model_does(monkeypatch, answers, score, reason):
    page = ROOT / "docs/environments.md"
    [agent] = [block for block in blocks(page, "python") if "def solve" in block]
    [config] = [block for block in blocks(page, "toml") if "my_agent:solve" in block]
    cfg = Config.model_validate(tomllib.loads(config))
    monkeypatch.setitem(sys.modules, "my_agent", module := ModuleType("my_agent"))
    exec(agent, module.__dict__)
    environment = cfg.environment if reason == "terminated" else cfg.environment.model_copy(update={"max_tokens": 210})
    options = {"model": TOKENIZER, "prompts": cfg.prompts, "sampling": cfg.sampling}
    host = Environments("Environments(0)", environment, **options)
    try:
        rollout, contexts = episode(host, make_prompt(answer="4"), model=said(*answers))
    finally:
        host.close()
    assert (score_of(rollout)[-1], rollout.finish_reason) == (score, reason)
    again = ASKED.format("That is wrong. Try again.")
    said_before = "".join(f"{answer}<|im_end|>\n{again}" for answer in answers[:-1])
    assert contexts[-1] == ASKED.format("Begin.") + said_before


# Before a run


@pytest.mark.parametrize(
    ("agent", "reason"),
    [
        (
            "wrong",
            r"must take a prompt and an endpoint, as in async def agent\(prompt, endpoint\); it takes \(prompt\)",
        ),
        ("Agent", "is a class; name a function, or an instance of the class"),
        ("missing", "has no function missing"),
    ],
)
def test_a_function_that_is_no_agent_is_refused(hosts, agent, reason):
    from actors.environments.check import check_environment

    with pytest.raises(UserError, match=reason):
        hosts(agent)
    with pytest.raises(UserError, match=reason):
        check_environment(EnvironmentConfig(agent=f"{MODULE}:{agent}"), with_template(CHATML), model="m", chat=True)


def test_the_check_of_an_agent_has_no_tools_for_prompts():
    from actors.environments.check import check_environment

    cfg = EnvironmentConfig(agent=f"{MODULE}:twice")
    assert check_environment(cfg, with_template(CHATML), model="m", chat=True) == []
