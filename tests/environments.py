"""Environments of the tests' runs, named in their configs as any user's would be."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from actors.environments.steps import Restart
from common.environment import Endpoint, EpisodePrompt, Step

TURNS = 3
ASKS = 3  # most requests of `adds` in an episode
_NUMBER = {"type": "integer"}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"left": _NUMBER, "right": _NUMBER}}}


class AWords:
    """Three turns. Each is rewarded with the share of a-words in it, and answered with two b-words."""

    async def reset(self, prompt: EpisodePrompt) -> None:
        self.turn = 0

    async def step(self, message: Mapping[str, Any]) -> Step:
        self.turn += 1
        words = message["content"].split()
        reward = sum(word.startswith("a") for word in words) / max(1, len(words))
        return Step(f" b{self.turn} b7", reward, terminated=self.turn == TURNS, info={"turn": self.turn})


class Restarting(AWords):
    """The second turn ends a sequence: another conversation begins after it."""

    async def step(self, message: Mapping[str, Any]) -> Step:
        step = await super().step(message)
        if self.turn == 2:
            return step._replace(observation=Restart([{"role": "user", "content": "a3 b5 b6"}], ends=True))
        return step


class Fragile(AWords):
    """Its process ends in the second turn of an episode, as often as the file `<index>.kill` of the prompt says. It can
    continue an episode. For prompts that end with b3 it raises an error."""

    async def reset(self, prompt: EpisodePrompt) -> None:
        await super().reset(prompt)
        self.file, self.text = Path(prompt.fields["kill"]), prompt.text

    async def step(self, message: Mapping[str, Any]) -> Step:
        if self.turn == 1 and self.file.exists() and (left := self.file.read_text()):
            self.file.write_text(left[1:])
            os._exit(1)
        if self.text.endswith("b3"):
            raise ValueError("b3 has no answer")
        return await super().step(message)

    def state(self) -> int:
        return self.turn

    def restore(self, state: int) -> None:
        self.turn = state


async def talks(prompt: EpisodePrompt, endpoint: Endpoint) -> dict[str, Any]:
    """An agent with two conversations: two requests of the first one, and one of the other. Its score is the share of
    a-words in all answers."""
    words: list[str] = []
    async with AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:

        async def ask(messages: list[Any]) -> Any:
            done = await client.chat.completions.create(model=endpoint.model, messages=messages)
            words.extend(done.choices[0].message.content.split())
            return done.choices[0].message.model_dump()

        first = [*prompt.messages, await ask([*prompt.messages]), {"role": "user", "content": "b5 b6"}]
        await ask(first)
        await ask([{"role": "user", "content": "a3 b7"}])
    return {"score": sum(word.startswith("a") for word in words) / max(1, len(words)), "info": {"words": len(words)}}


async def adds(prompt: EpisodePrompt, endpoint: Endpoint) -> dict[str, Any]:
    """An agent that does the sums in the model's calls until there are none. Its score is their number."""
    messages, num_calls = [*(prompt.messages or ())], 0
    async with AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
        for _ in range(ASKS):
            done = await client.chat.completions.create(
                model=endpoint.model, messages=messages, tools=[{"type": "function", "function": ADD}]
            )
            message = done.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls or ():
                result = sum(json.loads(call.function.arguments).values())
                messages.append({"role": "tool", "tool_call_id": call.id, "content": f"b{result}"})
            num_calls += len(message.tool_calls or ())
            if not message.tool_calls:
                break
    return {"score": num_calls, "info": {"calls": num_calls}}
