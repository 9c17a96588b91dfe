"""The shipped task with a tool: sums that need a calculator."""

import re

import pytest

from common.types import RewardInput
from common.user_code.tools import load_tools
from deploy.tasks.calculator import calculator, correct, heldout_prompts, heldout_sums, train_prompts, train_sums

ROLES = ["system", "user", "assistant", "tool", "assistant", "user"]


def numbers(record):
    """The three numbers of the last message."""
    return tuple(map(int, re.findall(r"\d+", record["prompt"][-1]["content"])))


def answer(*texts, response=""):
    """An episode whose turns have these texts; without any: one response without an environment."""
    turns = [{"text": text, "observation": [], "reward": 0.0, "info": {}} for text in texts]
    return RewardInput("Calculate 100 + 200 + 300", response, 3, "terminated", {"sum": 600}, turns=turns)


@pytest.mark.parametrize("seed", [0, 1])
def test_train_and_heldout_sums_are_disjoint_and_none_is_asked_twice(seed):
    train, heldout = ([numbers(record) for record in prompts(seed)] for prompts in (train_prompts, heldout_prompts))
    assert (len(train), len(heldout)) == (4096, 256)
    assert len({*train, *heldout}) == 4096 + 256
    assert min(map(min, train)) >= 100
    assert max(map(max, train)) <= 999


def test_a_prompt_is_an_example_of_a_call_and_a_question():
    record = heldout_prompts(0)[0]
    first, second, third = numbers(record)
    assert record["sum"] == first + second + third
    assert [message["role"] for message in record["prompt"]] == ROLES
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "740 + 285 + 859"}}</tool_call>'
    assert record["prompt"][2]["content"] == call
    assert record["prompt"][3]["content"] == record["prompt"][4]["content"] == str(740 + 285 + 859)
    assert record["prompt"][5]["content"] == f"Calculate {first} + {second} + {third}"


def test_the_calculator_is_a_tool():
    (tool,) = load_tools(["deploy.tasks.calculator:calculator"])
    assert tool.schema["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "expression": {"type": "string", "description": "Numbers with +, -, *, / and parentheses."},
        },
        "required": ["expression"],
    }


@pytest.mark.parametrize(
    ("expression", "value"),
    [("740 + 285 + 859", "1884"), (" 2*(3-4)/-4 ", "0.5"), ("7/3", "2.333333333"), ("12/4", "3"), ("+1.5*2", "3")],
)
def test_the_calculator_calculates(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1 +", r"'1 \+' is not an expression"),
        ("2 ** 9", r"'2 \*\* 9' is not a number or one of \+ - \* /"),
        ("open('x')", "is not a number"),
        ("True", "is not a number"),
        ("'a' + 'b'", "is not a number"),
        ("1" * 101, "longer than 100 characters"),
    ],
)
def test_the_calculator_refuses_what_it_cannot_calculate(expression, message):
    with pytest.raises(ValueError, match=message):
        calculator(expression)


@pytest.mark.parametrize(
    ("texts", "score"),
    [
        (["600"], 1.0),
        (["<tool_call>...</tool_call>", "The sum is 600."], 1.0),
        (["600", "601"], 0.0),  # the last turn counts
        (["600", "I do not know."], 0.0),
        (["100 + 200 + 300"], 0.0),
    ],
)
def test_correct_compares_the_last_number_of_the_last_turn_with_the_sum(texts, score):
    assert correct(answer(*texts, response="the whole episode 600")) == score


def test_correct_without_an_environment_reads_the_response():
    assert correct(answer(response="It is 600")) == 1.0
    assert correct(answer(response="It is 601")) == 0.0


def test_correct_reads_numbers_with_commas():
    large = RewardInput("", "It is 1,884.", 3, "stop", {"sum": 1884})
    assert correct(large) == 1.0


def test_the_sums_without_the_tool_are_the_same_and_show_no_call():
    for made, alone in ((train_prompts, train_sums), (heldout_prompts, heldout_sums)):
        for record, plain in zip(made(3)[:50], alone(3)[:50], strict=True):
            assert plain["sum"] == record["sum"]
            assert plain["prompt"][-1] == record["prompt"][-1]
            assert [message["role"] for message in plain["prompt"]] == ["user", "assistant", "user"]
            first, answer, _ = (message["content"] for message in plain["prompt"])
            assert int(answer) == sum(int(number) for number in first.removeprefix("Calculate ").split(" + "))
