"""Tokens of what an environment says, as the continuation of a response. Runs in each environment replica, and in the
driver for the check before a run.

Tokens that the model sampled are never encoded again from text. This file makes the tokens that follow them (`added`):

    prompt      <|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n
    sampled     4<|im_end|>
    added       \n<|im_start|>user\nAnd 3 + 3?<|im_end|>\n<|im_start|>assistant\n

A chat template renders only whole conversations. So this file renders a made-up conversation, and takes the text after
its assistant's message. This is right if the template writes each message in the same way whatever comes before and
after it. Some templates do not: they drop the reasoning of earlier answers. `check_template` refuses these. Before
messages of the role `tool`, the made-up assistant's message has tool calls, because some templates demand them.
With environment.sequence = "turn" the whole conversation is rendered again for each turn, sampled texts included.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import takewhile
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from common.data.messages import Message
from common.data.prompt_tokens import bare_ids, rendered, rendered_ids, text_ids
from common.errors import UserError

QUESTION: Message = {"role": "user", "content": "A question."}
ANSWER = "Answer 7f3a."  # in no template
ARGUMENT = "Argument 2b9c."  # in no template
THOUGHT = f"<think>\nA thought.\n</think>\n\n{ANSWER}"  # some templates cut it off from earlier answers
NEXT: Message = {"role": "user", "content": "Another one."}
_TOOL_ANSWER: Message = {"role": "tool", "name": "tool", "tool_call_id": "call00000", "content": "An answer."}
# The answers of tools to one call, and to two calls.
TOOL_ANSWERS = (
    [_TOOL_ANSWER],
    [_TOOL_ANSWER, {**_TOOL_ANSWER, "tool_call_id": "call00001", "content": "Another one."}],
)


class Rendering(Protocol):
    """Turns what an environment says into tokens. Methods raise any error of the template. `options` are arguments of
    the template for this call, next to those of the run."""

    def continuation(self, observation: Sequence[Message], last_id: int | None, **options: Any) -> list[int]:
        """The tokens between the model's last one, `last_id`, and its next one. None: it sampled none."""

    def prompt(self, conversation: Sequence[Message], **options: Any) -> list[int]:
        """The tokens of a whole conversation, up to the model's next one."""


class PlainRendering:
    """With prompts.format = "plain": the observation's text, unchanged."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def continuation(self, observation: Sequence[Message], last_id: int | None, **options: Any) -> list[int]:
        return continued_ids(self._tokenizer, "".join(message["content"] for message in observation))

    def prompt(self, conversation: Sequence[Message], **options: Any) -> list[int]:
        return text_ids(self._tokenizer, "".join(message["content"] for message in conversation))


class ChatRendering:
    """With prompts.format = "chat": the end of the model's message, the observation's messages, and the beginning of
    the model's next one, as the chat template writes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, end_tokens: Collection[int] = (), **options: Any) -> None:
        """`end_tokens`: all that end a response. `options`: arguments of the template, such as `tools`."""
        self._tokenizer, self._options = tokenizer, options
        self._end_tokens = frozenset([*end_tokens, tokenizer.eos_token_id])

    def continuation(self, observation: Sequence[Message], last_id: int | None, **options: Any) -> list[int]:
        """Raises ValueError if the template leaves out what the assistant says."""
        _, after = self._before_and_after(observation, **options)
        ids = continued_ids(self._tokenizer, after)
        _, after_end, end_id = self._closing
        # A response that was cut off lacks the end token. One that ends with another end token needs no second one.
        ended = last_id is not None and (last_id == end_id or last_id in self._end_tokens)
        return ids[after_end:] if ended else ids

    def prompt(self, conversation: Sequence[Message], **options: Any) -> list[int]:
        return rendered_ids(self._tokenizer, self._rendered(conversation, add_generation_prompt=True, **options))

    def _rendered(self, conversation: Sequence[Message], **options: Any) -> str:
        return rendered(self._tokenizer, conversation, **{**self._options, **options})

    @cached_property
    def _closing(self) -> tuple[str, int, int | None]:
        """The end of the model's message: its text with the template's end token, the number of its tokens, and the end
        token. "", 0 and None if the template has no end token."""
        # The end of the model's message: what both conversations have after its text.
        text = _common_beginning(self._after_answer([]), self._after_answer([NEXT]))
        closing = continued_ids(self._tokenizer, text)
        # The first special token in it is the template's end token, which need not be the tokenizer's.
        special = {self._tokenizer.eos_token_id, *self._tokenizer.added_tokens_decoder}
        after_end = next((place for place, token in enumerate(closing, 1) if token in special), 0)
        if not after_end:
            return "", 0, None
        end_id = closing[after_end - 1]
        before, end, _ = text.partition(self._tokenizer.convert_ids_to_tokens(end_id))
        return before + end, after_end, end_id

    def _before_and_after(self, observation: Sequence[Message], **options: Any) -> tuple[Message, str]:
        """An assistant's message that the template can write before `observation`, and the text from the end of its
        content to the beginning of its next message."""
        if found := self._calls_and_after(observation, **options):
            return found
        after = self._after_answer(observation, add_generation_prompt=True, **options)
        return {"role": "assistant", "content": ANSWER}, after

    def _calls_and_after(self, observation: Sequence[Message], **options: Any) -> tuple[Message, str] | None:
        """The same with tool calls in the message. None if `observation` answers no calls, or the template cannot write
        them."""
        for calls in _possible_calls(observation):
            said: Message = {"role": "assistant", "content": "", "tool_calls": calls}
            with suppress(Exception):
                return said, self._after_calls(said, observation, **options)
        return None

    def _after_calls(self, said: Message, observation: Sequence[Message], **options: Any) -> str:
        """The text after a message with calls. The text from ARGUMENT to the end token belongs to the call: the model
        samples it. Raises ValueError if either is missing."""
        alone = self._rendered([QUESTION, said], **options)
        whole = self._rendered([QUESTION, said, *observation], add_generation_prompt=True, **options)
        after = whole.partition(ARGUMENT)[2]
        message = _common_beginning(alone.partition(ARGUMENT)[2], after)
        # The last special token of the message: some templates have others in calls.
        special = map(str, self._tokenizer.added_tokens_decoder.values())
        end = max((message.rfind(token) + len(token) for token in special if token in message), default=0)
        if not end:
            raise ValueError("it leaves out tool calls, or their end token")
        return self._closing[0] + after[end:]

    def _after_answer(self, observation: Sequence[Message], **options: Any) -> str:
        """What a conversation has after the content of the assistant's message, if `observation` comes next."""
        conversation = [QUESTION, {"role": "assistant", "content": ANSWER}, *observation]
        _, found, after = self._rendered(conversation, **options).partition(ANSWER)
        if not found:
            raise ValueError("it leaves out what the assistant says")
        return after


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that continues another one. Tokenizers such as Llama 2's put a space before every text, which
    would be wrong here, so the text is encoded after a line break, whose tokens are then removed."""
    [alone] = bare_ids(tokenizer, [text])
    if not alone or not tokenizer.convert_ids_to_tokens(bare_ids(tokenizer, ["a"])[0][0]).startswith("▁"):
        return alone
    before, whole = bare_ids(tokenizer, ["\n", f"\n{text}"])
    return whole[len(before) :] if whole[: len(before)] == before else alone


def _possible_calls(observation: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The tool calls that these messages answer, in the forms that templates want. None at all if the messages do not
    begin with the role `tool`. The last call has ARGUMENT."""
    answers = list(takewhile(lambda message: message["role"] == "tool", observation))
    texts = [*[""] * (len(answers) - 1), ARGUMENT]
    for form in (dict, json.dumps) if answers else ():  # some templates add the arguments to other text
        yield [
            {
                "type": "function",
                "id": answer.get("tool_call_id", f"call{number:05d}"),
                "function": {"name": answer.get("name") or "tool", "arguments": form({"text": text})},
            }
            for number, (answer, text) in enumerate(zip(answers, texts))
        ]


def _common_beginning(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:length]


def make_rendering(
    tokenizer: PreTrainedTokenizerBase, *, chat: bool, end_tokens: Collection[int] = (), **options: Any
) -> Rendering:
    """The rendering of a run. `chat`: prompts.format is "chat". See ChatRendering for the rest."""
    return ChatRendering(tokenizer, end_tokens=end_tokens, **options) if chat else PlainRendering(tokenizer)


# Before a run


def check_template(
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    observations: Sequence[Sequence[Message]] = ([NEXT],),
    *,
    calls: bool = False,
    plain: bool = True,
    **options: Any,
) -> None:
    """Raises UserError if the template writes a conversation in another way than prompt, responses and continuations
    one after another. `model` is its name, for the message. `observations`: what an environment may say, such as a
    message of the role `tool`. `calls`: see `check_conversations`. `plain`: the run could have prompts.format =
    "plain". `options`: arguments of the template, such as `tools`."""
    with _refusals(model, plain):
        rendering = ChatRendering(tokenizer, **options)
        for observation in observations:
            for answer in (ANSWER, THOUGHT):
                if not _grows(rendering, answer, observation):
                    what = "changes or drops earlier messages"
                    if answer == THOUGHT and _grows(rendering, ANSWER, observation):
                        what = "drops the reasoning (<think>) of earlier answers"
                    remedies = [
                        f"give the model a chat_template that keeps earlier messages unchanged (in {model}, "
                        "chat_template.jinja or tokenizer_config.json)"
                    ]
                    with suppress(UserError):  # the template may also refuse whole conversations
                        check_conversations(tokenizer, model, observations, calls=calls, **options)
                        remedies.insert(0, 'set environment.sequence = "turn"')
                    raise UserError(
                        f"environment: the chat template of {model} {what} when a conversation continues, so an "
                        f"episode cannot be one sequence; {_one_of(remedies, plain)}"
                    )


def check_conversations(
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    observations: Sequence[Sequence[Message]] = ([NEXT],),
    *,
    calls: bool = False,
    plain: bool = True,
    **options: Any,
) -> None:
    """Raises UserError if the template cannot write a conversation of several turns. For environment.sequence = "turn",
    which needs no more. `calls`: the run's conversations have tool calls in the assistant's messages, as an agent's
    requests do. Without it they have the text that the model wrote. See `check_template` for the other arguments."""
    with _refusals(model, plain):
        rendering = ChatRendering(tokenizer, **options)
        for observation in observations:
            said: Message = {"role": "assistant", "content": ANSWER}
            if calls and (found := rendering._calls_and_after(observation)):
                said, _ = found
            if not rendering.prompt([QUESTION, said, *observation, said, *observation]):
                raise ValueError("it writes no text")


@contextmanager
def _refusals(model: str, plain: bool) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"environment: the chat template of {model} refuses a conversation of several turns: {error}; "
            + _one_of(["give the model another chat_template"], plain)
        ) from error


def _one_of(remedies: Sequence[str], plain: bool) -> str:
    *others, last = [*remedies, *(['use prompts.format = "plain"'] if plain else [])]
    return f"{', '.join(others)}, or {last}" if others else last


def _grows(rendering: ChatRendering, answer: str, observation: Sequence[Message]) -> bool:
    """True if a conversation of two turns is its prompt, and then twice the answer and its continuation. A template may
    put white space before an answer: the model then samples it."""
    said, follows = rendering._before_and_after(observation)
    turn = [{**said, "content": answer}, *observation]
    prompt, one, two = (
        rendering._rendered([QUESTION, *turn * number], add_generation_prompt=True) for number in range(3)
    )
    if not (one.startswith(prompt) and two.startswith(one)):
        return False
    first, second = one[len(prompt) :].lstrip(), two[len(one) :].lstrip()
    if "tool_calls" in said:  # some templates leave out the content next to calls
        return first == second and first.endswith(follows.removeprefix(rendering._closing[0]))
    return first == second == answer + follows
