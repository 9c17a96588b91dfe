"""Tokens of what an environment says, as the continuation of a response. Runs in each environment replica, and in the
driver for the check before a run.

Tokens that the model sampled are never encoded again from text. What follows them is:

    prompt      <|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n
    sampled     4<|im_end|>
    here        \n<|im_start|>user\nAnd 3 + 3?<|im_end|>\n<|im_start|>assistant\n

A chat template writes these texts only as parts of a whole conversation. So a made-up conversation is rendered, and the
text after the assistant's message in it is taken. This is right if a template writes each message in the same way
whatever comes before and after it. Not all do: some drop the reasoning of earlier answers. `check_template` finds them.
With environment.sequence = "turn" the whole conversation is rendered again for each turn, sampled texts included.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from common.data.messages import Message
from common.data.prompt_tokens import bare_ids, rendered, rendered_ids, text_ids
from common.errors import UserError

QUESTION: Message = {"role": "user", "content": "A question."}
ANSWER = "Answer 7f3a."  # in no template
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
        ids = continued_ids(self._tokenizer, self._after_answer(observation, add_generation_prompt=True, **options))
        after_end, end_id = self._closing
        # A response that was cut off lacks the end token. One that ends with another end token needs no second one.
        ended = last_id is not None and (last_id == end_id or last_id in self._end_tokens)
        return ids[after_end:] if ended else ids

    def prompt(self, conversation: Sequence[Message], **options: Any) -> list[int]:
        options = {**self._options, **options}
        return rendered_ids(
            self._tokenizer, rendered(self._tokenizer, conversation, add_generation_prompt=True, **options)
        )

    @cached_property
    def _closing(self) -> tuple[int, int | None]:
        """In what follows the model's message: the place after the template's end token, and that token. 0 and None if
        there is none."""
        # The end of the model's message, whatever comes next.
        text = _common_beginning(self._after_answer([]), self._after_answer([NEXT]))
        closing = continued_ids(self._tokenizer, text)
        # The first special token in it is the template's end token, which need not be the tokenizer's.
        special = {self._tokenizer.eos_token_id, *self._tokenizer.added_tokens_decoder}
        after_end = next((place for place, token in enumerate(closing, 1) if token in special), 0)
        return after_end, closing[after_end - 1] if after_end else None

    def _after_answer(self, observation: Sequence[Message], **options: Any) -> str:
        """What a conversation has after the content of the assistant's message, if `observation` comes next."""
        conversation = [QUESTION, {"role": "assistant", "content": ANSWER}, *observation]
        options = {**self._options, **options}
        _, found, after = rendered(self._tokenizer, conversation, **options).partition(ANSWER)
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
    **options: Any,
) -> None:
    """Raises UserError if the template writes a conversation in another way than prompt, responses and continuations
    one after another. `model` is its name, for the message. `observations`: what an environment may say, such as a
    message of the role `tool`. `options`: arguments of the template, such as `tools`."""
    with _refusals(model):
        rendering = ChatRendering(tokenizer, **options)
        for observation in observations:
            for answer in (ANSWER, THOUGHT):
                if not _grows(tokenizer, rendering, answer, observation, options):
                    what = "changes or drops earlier messages"
                    if answer == THOUGHT and _grows(tokenizer, rendering, ANSWER, observation, options):
                        what = "drops the reasoning (<think>) of earlier answers"
                    raise UserError(
                        f"environment: the chat template of {model} {what} when a conversation continues, so an "
                        'episode cannot be one sequence; set environment.sequence = "turn", give the model a '
                        f"chat_template that keeps earlier messages unchanged (in {model}, chat_template.jinja or "
                        'tokenizer_config.json), or use prompts.format = "plain"'
                    )


def check_conversations(
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    observations: Sequence[Sequence[Message]] = ([NEXT],),
    **options: Any,
) -> None:
    """Raises UserError if the template cannot write a conversation of several turns. For environment.sequence = "turn",
    which needs no more. See `check_template` for the arguments."""
    with _refusals(model):
        rendering = ChatRendering(tokenizer, **options)
        for observation in observations:
            said: Message = {"role": "assistant", "content": ANSWER}
            if not rendering.prompt([QUESTION, said, *observation, said, *observation]):
                raise ValueError("it writes no text")


@contextmanager
def _refusals(model: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"environment: the chat template of {model} refuses a conversation of several turns: {error}; give the "
            'model another chat_template, or use prompts.format = "plain"'
        ) from error


def _grows(
    tokenizer: PreTrainedTokenizerBase,
    rendering: ChatRendering,
    answer: str,
    observation: Sequence[Message],
    options: dict[str, Any],
) -> bool:
    """True if a conversation of two turns is its prompt, and then twice the answer and its continuation. A template may
    put white space before an answer: the model then samples it."""
    said = {"role": "assistant", "content": answer}
    follows = rendering._after_answer(observation, add_generation_prompt=True)
    rest = rendered(
        tokenizer, [QUESTION, said, *observation, said, *observation], add_generation_prompt=True, **options
    )
    prompt = rendered(tokenizer, [QUESTION], add_generation_prompt=True, **options)
    if not rest.startswith(prompt):
        return False
    rest = rest[len(prompt) :]
    for _ in range(2):
        rest = rest.lstrip()
        if not rest.startswith(answer + follows):
            return False
        rest = rest[len(answer + follows) :]
    return not rest
