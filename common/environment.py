"""What an environment is: the class that answers the model in an episode of several turns. Runs anywhere. Imports only
the standard library.

`environment.function = "module:Class"` names the class. Every episode has an instance of its own. A guessing game:

    from common.environment import Step

    class Guess:
        async def reset(self, prompt):
            self.number = prompt.seed % 100

        async def step(self, message):
            guess = int(message["content"])
            if guess == self.number:
                return Step("Right!", reward=1.0, terminated=True)
            return Step("Higher." if guess < self.number else "Lower.")

Methods may be `async def` or plain `def`. If `step` is async, all methods of all episodes run on one event loop, so
none of them may block it. If `step` is plain, each episode has a thread of its own.

An episode ends without a score (it is void, and is not learned from) if a method raises an exception, ends the process,
takes longer than environment.step_timeout_s, or returns anything that is not described here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

Message = Mapping[str, Any]
"""A chat message: `role`, `content` (text), and more keys that the model's chat template knows."""
Observation = str | Sequence[Message] | None
"""The answer of an environment. A text is one message of the role `user`; None and "" add no message. With
prompts.format = "plain" it must be text, which is added to the response unchanged."""

VOID_KINDS: Mapping[str, str] = {
    "raised": "a method raised an exception",
    "timed_out": "a method took longer than `environment.step_timeout_s`",
    "wrong_answer": "a method returned a value that it must not return",
    "template": "the chat template refused the messages that `step` returned",
    "died": "several processes died while they ran the episode, or its process lost it",
}
"""The reasons for which an environment voids an episode, by their name in metrics."""


class Step(NamedTuple):
    """An environment's answer to a turn of the model, with the names that Gymnasium has. A plain tuple of all five
    values is accepted too."""

    observation: Observation = None  # the next messages for the model
    reward: float = 0.0  # of this turn; the sum over all turns is the raw score of a source with `environment = true`
    terminated: bool = False  # the episode is over, because the task is solved or lost
    truncated: bool = False  # the episode is cut off, for another reason
    info: Mapping[str, Any] = {}  # a dict of JSON values; the journal keeps it, the model does not see it


@dataclass(frozen=True)
class EpisodePrompt:
    """The argument of `reset`: a prompt of the training or held-out data."""

    text: str  # as the model reads it: with prompts.format = "chat", after the chat template
    messages: Sequence[Message] | None  # with prompts.format = "chat"
    fields: Mapping[str, Any] = field(default_factory=dict)  # the record's other columns, such as a reference answer
    seed: int = 0  # of this episode: depends on the seed of the run and the prompt's sample id alone


@dataclass(frozen=True)
class Endpoint:
    """The OpenAI-compatible endpoint where the agent of one episode asks the model. It has chat completions only.
    `environment.agent = "module:function"` names the agent:

        from openai import AsyncOpenAI

        async def agent(prompt, endpoint) -> float:
            client = AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key)
            answer = await client.chat.completions.create(model=endpoint.model, messages=prompt.messages)
            return float(prompt.fields["answer"] in answer.choices[0].message.content)
    """

    base_url: str  # http://127.0.0.1:PORT/v1
    api_key: str  # of this episode alone
    model: str


class Environment(Protocol):
    """One episode. Only `step` is required. Methods are `async def` or `def`.

    A class may also have both of these, so that an episode continues when its process is lost. Without them it begins
    again.

        state(self) -> Any             called after each step of an episode that continues; the result is pickled
        restore(self, state) -> None   called on a new instance, after `reset` with the same prompt
    """

    async def reset(self, prompt: EpisodePrompt) -> Observation:
        """Called once, before the first turn. Returns None to begin with the prompt as it is, or the messages (with
        prompts.format = "plain": the text) that replace it. The answer must depend on the prompt and its seed alone."""

    async def step(self, message: Message) -> Step:
        """Answers a turn. `message` has the role `assistant` and what the model wrote as `content`, without special
        tokens."""

    async def close(self) -> None:
        """Called once at the end of the episode, also after a failure. Frees what the instance holds. A failure here
        changes nothing about the episode."""
