"""Sums of three numbers, which a small model cannot do by itself: it must learn to call the calculator. Prompts from a
seeded generator, the tool, and the function that scores an answer.

Runs in the driver, in each environment replica (the tool), and in each reward replica.
"""

from __future__ import annotations

import ast
import json
import operator
import random
import re
from collections.abc import Callable
from typing import Any

from common.types import RewardInput

TRAIN_PROMPTS, HELDOUT_PROMPTS = 4096, 256
LONGEST_EXPRESSION = 100  # characters

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculator(expression: str) -> str:
    """Calculates.

    Args:
        expression: Numbers with +, -, *, / and parentheses.
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"the expression is longer than {LONGEST_EXPRESSION} characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError(f"{expression!r} is not an expression") from None
    return str(int(value)) if value == int(value) else f"{value:.10g}"


def train_prompts(seed: int) -> list[dict[str, Any]]:
    """4096 sums, none of them held out."""
    return _questions(seed)[HELDOUT_PROMPTS:]


def heldout_prompts(seed: int) -> list[dict[str, Any]]:
    """256 sums that are in no training prompt."""
    return _questions(seed)[:HELDOUT_PROMPTS]


def train_sums(seed: int) -> list[dict[str, Any]]:
    """The sums of `train_prompts` without the tool: the example has no call."""
    return [_without_tool(record) for record in train_prompts(seed)]


def heldout_sums(seed: int) -> list[dict[str, Any]]:
    """The sums of `heldout_prompts` without the tool."""
    return [_without_tool(record) for record in heldout_prompts(seed)]


def correct(answer: RewardInput) -> float:
    """1 if the last number of the last turn is the sum, else 0. Without the tool there is one turn."""
    text = answer.turns[-1]["text"] if answer.turns else answer.response
    numbers = re.findall(r"\d+", text.replace(",", ""))
    return float(bool(numbers) and int(numbers[-1]) == answer.fields["sum"])


def _value(node: ast.expr) -> float:
    """The value of a parsed expression. Raises ValueError for anything but numbers and the four operations."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.operand))
    raise ValueError(f"{ast.unparse(node)!r} is not a number or one of + - * /")


def _questions(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    sums: dict[tuple[int, ...], None] = {}  # a set that keeps the order
    while len(sums) < TRAIN_PROMPTS + HELDOUT_PROMPTS:
        sums[tuple(rng.randint(100, 999) for _ in range(3))] = None
    return [{"prompt": [*_EXAMPLE, _question(numbers)], "sum": sum(numbers)} for numbers in sums]


def _without_tool(record: dict[str, Any]) -> dict[str, Any]:
    _, question, _, _, answer, asked = record["prompt"]
    return {**record, "prompt": [question, answer, asked]}


def _question(numbers: tuple[int, ...]) -> dict[str, str]:
    return {"role": "user", "content": f"Calculate {_expression(numbers)}"}


def _expression(numbers: tuple[int, ...]) -> str:
    return " + ".join(map(str, numbers))


def _example(numbers: tuple[int, ...]) -> list[dict[str, str]]:
    """A conversation in which the tool is called. The model's chat template ignores tools, so this tells it about
    them."""
    call = {"name": "calculator", "arguments": {"expression": _expression(numbers)}}
    return [
        {"role": "system", "content": "Use the calculator."},
        _question(numbers),
        {"role": "assistant", "content": f"<tool_call>{json.dumps(call)}</tool_call>"},
        {"role": "tool", "content": str(sum(numbers))},
        {"role": "assistant", "content": str(sum(numbers))},
    ]


_EXAMPLE = _example((740, 285, 859))
