"""Episodes with tools in an environment replica, and the check of tools before a run."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from actors.environments.check import check_environment
from actors.environments.environments import Environments
from common.config.actors import PromptFormat
from common.config.environment import EnvironmentConfig
from common.data.prompt_records import prompt_record
from common.data.prompt_tokens import bare_ids
from common.errors import UserError
from common.types import IN_EPISODE, Prompt, Rollout, SampleId
from common.user_code.tools import load_tools
from tests.actors.environments.templates import CHATML, MISTRAL, with_template

CALCULATOR = "deploy.tasks.calculator:calculator"
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "740 + 285 + 859"}}</tool_call>'
CHAT = PromptFormat(format="chat")
NOT_A_TOOL = "tests.actors.environments.templates:llama_3"


@pytest.fixture(scope="module")
def tokenizer():
    return with_template(CHATML)


def play(tokenizer, *texts, **settings):
    """The rollout after turns of the model with these texts, each with its end token."""
    cfg = EnvironmentConfig(tools=(CALCULATOR,), **settings)
    environments = Environments("Environments(0)", cfg, model=tokenizer, prompts=CHAT)
    record = prompt_record("here", {"prompt": "Calculate."}, CHAT, tokenizer)
    prompt = Prompt(SampleId(0, 0, 0), record.text, record.token_ids, {}, record.messages)
    empty = np.empty(0, dtype=np.int32)

    async def episode():
        begun, _ = await environments.begin(prompt)
        rollout = Rollout(begun, empty, empty.astype(np.float32), empty, "", "Generator(0)")
        for text in texts:
            ids = [*bare_ids(tokenizer, [text])[0], tokenizer.eos_token_id]
            rollout, _, _ = await environments.step(
                replace(
                    rollout,
                    response_ids=np.concatenate([rollout.response_ids, np.asarray(ids, np.int32)]),
                    rollout_logprobs=np.append(rollout.rollout_logprobs, np.full(len(ids), -0.5, np.float32)),
                    policy_versions=np.append(rollout.policy_versions, np.full(len(ids), 3, np.int32)),
                )
            )
        return rollout

    try:
        return asyncio.run(episode())
    finally:
        environments.close()


def test_a_call_is_answered_in_the_tokens_of_the_rollout(tokenizer):
    rollout = play(tokenizer, CALL, "It is 1884.")
    assert tokenizer.decode(rollout.response_ids) == (
        f"{CALL}<|im_end|>\n<|im_start|>tool\n1884<|im_end|>\n<|im_start|>assistant\nIt is 1884.<|im_end|>"
    )
    first, second = rollout.turns
    assert json.loads(first.info) == {"tool_calls": 1, "failed_calls": 0}
    assert json.loads(second.info) == {"tool_calls": 0, "failed_calls": 0}
    said = tokenizer.decode(rollout.response_ids[first.end : first.next_start])
    assert said == "\n<|im_start|>tool\n1884<|im_end|>\n<|im_start|>assistant\n"
    assert (second.end, second.next_start) == (len(rollout.response_ids),) * 2
    assert (rollout.finish_reason, first.reward, second.reward) == ("terminated", 0.0, 0.0)


def test_two_calls_of_a_turn_are_answered_in_two_messages(tokenizer):
    rollout = play(tokenizer, f"{CALL}\n{CALL.replace('285', 'x')}")
    assert [message["content"] for message in json.loads(rollout.turns[0].observation)] == [
        "1884",
        "Error: ValueError: 'x' is not a number or one of + - * /",
    ]
    assert json.loads(rollout.turns[0].info) == {"tool_calls": 2, "failed_calls": 1}
    assert rollout.finish_reason == IN_EPISODE


def test_special_tokens_of_a_call_reach_the_parser(tokenizer):
    """As in the format of Granite, whose calls begin with a special token."""
    special = with_template(CHATML)
    special.add_tokens(["<|tool_call|>"], special_tokens=True)
    call = '<|tool_call|>[{"name": "calculator", "arguments": {"expression": "1 + 1"}}]'
    rollout = play(special, call, tool_parser="granite")
    assert json.loads(rollout.turns[0].observation)[0]["content"] == "2"


def test_an_unknown_parser_is_refused_when_the_replica_starts(tokenizer):
    with pytest.raises(UserError, match=r'environment.tool_parser \("ham"\) is unknown to vLLM'):
        play(tokenizer, tool_parser="ham")


def test_the_check_gives_the_schemas_for_the_chat_template(tokenizer):
    cfg = EnvironmentConfig(tools=(CALCULATOR,))
    (tool,) = load_tools(cfg.tools)
    assert check_environment(cfg, tokenizer, model="M", chat=True) == [tool.schema]


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (NOT_A_TOOL.replace("llama_3", "none"), "has no function none"),
        ("json:dumps", r"environment.tools \(json:dumps\): a call names every argument, so the parameter kw cannot be"),
        (
            NOT_A_TOOL.replace("llama_3", "with_template"),
            "cannot be described to the model: Argument template is missing",
        ),
    ],
)
def test_the_check_refuses_a_function_that_cannot_be_a_tool(tokenizer, tool, message):
    with pytest.raises(UserError, match=message):
        check_environment(EnvironmentConfig(tools=(tool,)), tokenizer, model="M", chat=True)


def test_the_check_refuses_a_template_without_the_role_tool():
    tokenizer = with_template(MISTRAL, end="</s>", bos="<s>")
    with pytest.raises(
        UserError, match="chat template of M refuses a conversation of several turns: roles must altern"
    ):
        check_environment(EnvironmentConfig(tools=(CALCULATOR,)), tokenizer, model="M", chat=True)
