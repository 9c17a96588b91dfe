"""Agents that tests play, with the real client of OpenAI. They fail in every way."""

import asyncio
import sys
import time

import openai
from openai import AsyncOpenAI, OpenAI

seen = []  # what the agents of a test got; each test clears it
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]


def user(text):
    return {"role": "user", "content": text}


def client_of(endpoint, **options):
    return AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, **options)


async def ask(endpoint, messages, **options):
    """The answer's message, as a request has it."""
    async with client_of(endpoint) as client:
        done = await client.chat.completions.create(model=endpoint.model, messages=messages, **options)
    seen.append(done)
    return done.choices[0].message


async def twice(prompt, endpoint):
    """A conversation of two turns."""
    messages = [*prompt.messages]
    for text in ("And?", None):
        message = await ask(endpoint, messages)
        messages += [message.model_dump(), user(text)]
    return len(messages[-2]["content"])


async def scored(prompt, endpoint):
    """Returns what the prompt's field says."""
    await ask(endpoint, prompt.messages)
    return prompt.fields["score"]


def plain(prompt, endpoint):
    """A plain function with the client that blocks."""
    client = OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key)
    done = client.chat.completions.create(model=endpoint.model, messages=prompt.messages)
    return {"score": 2, "info": {"said": done.choices[0].message.content}}


async def streaming(prompt, endpoint):
    stream = await client_of(endpoint).chat.completions.create(
        model=endpoint.model, messages=prompt.messages, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        seen.append(chunk)
    return 1


async def calling(prompt, endpoint):
    """Calls tools until the model calls none."""
    messages = [*prompt.messages]
    while (message := await ask(endpoint, messages, tools=TOOLS)).tool_calls:
        messages.append(message.model_dump())
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": call.function.arguments} for call in message.tool_calls
        ]
    return 1.0


async def asks(prompt, endpoint):
    """Sends the conversations of the prompt's field `ask`, one after another. $N is the N-th answer."""
    answers = []
    for messages in prompt.fields["ask"]:
        conversation = [
            answers[int(text[1:])].model_dump(exclude_none=True) if text.startswith("$") else user(text)
            for text in messages
        ]
        answers.append(await ask(endpoint, conversation))
    return 1.0


async def at_once(prompt, endpoint):
    """Several requests at the same time."""
    answers = await asyncio.gather(*(ask(endpoint, [user(text)]) for text in prompt.fields["texts"]))
    seen.append([answer.content for answer in answers])
    return 1.0


async def refused(prompt, endpoint):
    """Sends a request that the prompt's field `request` changes, then a good one."""
    request = {"model": endpoint.model, "messages": list(prompt.messages), **prompt.fields["request"]}
    try:
        await client_of(endpoint).chat.completions.create(**request)
        seen.append(None)
    except openai.APIStatusError as error:
        seen.append(error)
        await ask(endpoint, prompt.messages)
    return 1.0


async def lists(prompt, endpoint):
    """Lists the models, and asks for what the endpoint does not have."""
    seen.append([model.id async for model in client_of(endpoint).models.list()])
    seen.append((await client_of(endpoint).models.retrieve(endpoint.model)).id)
    for wrong in (
        client_of(endpoint).embeddings.create(model=endpoint.model, input="a"),
        AsyncOpenAI(base_url=endpoint.base_url, api_key="guess").models.list(),
        AsyncOpenAI(base_url=endpoint.base_url, api_key="guess").chat.completions.create(
            model=endpoint.model, messages=prompt.messages
        ),
    ):
        try:
            await wrong
        except openai.APIStatusError as error:
            seen.append(error)
    await ask(endpoint, prompt.messages)
    return 0


async def without_request(prompt, endpoint):
    return 1.0


async def raises(prompt, endpoint):
    await ask(endpoint, prompt.messages)
    raise ZeroDivisionError("oh")


async def raises_at_once(prompt, endpoint):
    raise ZeroDivisionError("oh")


async def exits(prompt, endpoint):
    await ask(endpoint, prompt.messages)
    sys.exit(3)


async def hangs(prompt, endpoint):
    await ask(endpoint, prompt.messages)
    try:
        await asyncio.sleep(1000)
    finally:
        seen.append("cancelled")


async def hangs_at_once(prompt, endpoint):
    await asyncio.sleep(1000)


async def cancels(prompt, endpoint):
    await ask(endpoint, prompt.messages)
    asyncio.current_task().cancel()
    await asyncio.sleep(1)


async def blocks(prompt, endpoint):
    await ask(endpoint, prompt.messages)
    seen.append("blocks")
    time.sleep(4)
    seen.append("blocked")


async def endless(prompt, endpoint):
    """Asks until it is refused. Returns the number of answers if the prompt's field `catches` is true."""
    messages, answers = [*prompt.messages], 0
    try:
        while True:
            messages += [(await ask(endpoint, messages)).model_dump(), user("word " * prompt.fields.get("words", 1))]
            answers += 1
    except openai.BadRequestError as error:
        seen.append(error)
        if prompt.fields["catches"]:
            return answers
        raise


async def insists(prompt, endpoint):
    """Sends each text of the prompt's field `texts` as a conversation, also after a refusal. Returns the number of
    answers, or raises the last refusal if the field `raises` is true."""
    answers, last = 0, None
    for text in prompt.fields["texts"]:
        try:
            await ask(endpoint, [user(text)])
            answers += 1
        except openai.BadRequestError as error:
            last = error
            seen.append(error)
    if prompt.fields.get("raises"):
        raise last
    return answers


async def leaves_a_request(prompt, endpoint):
    """Returns while another request is open, and asks again after its end."""
    first = await ask(endpoint, prompt.messages)

    async def later():
        await ask(endpoint, [user("Open.")])
        try:
            while True:
                await ask(endpoint, [user("Late.")])
        except openai.APIStatusError as error:
            seen.append(error)

    seen.append(asyncio.create_task(later()))
    while "open" not in seen:
        await asyncio.sleep(0.01)
    return len(first.content)


def plain_catches(prompt, endpoint):
    client = OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key)
    try:
        client.chat.completions.create(model=endpoint.model, messages=prompt.messages)
    except openai.APIStatusError as error:
        seen.append(error)
    return 1.0


async def gives_up(prompt, endpoint):
    """Gives up one request, and then another one is answered."""
    await ask(endpoint, [user("One.")])
    first = asyncio.create_task(ask(endpoint, [user("Two.")]))
    while "two" not in seen:
        await asyncio.sleep(0.01)
    second = asyncio.create_task(ask(endpoint, [user("Three.")]))
    while "queued" not in seen:
        await asyncio.sleep(0.01)
    second.cancel()
    await first
    await ask(endpoint, [user("Four.")])
    return 1.0


class Agent:
    async def __call__(self, prompt, endpoint):
        return await scored(prompt, endpoint)


instance = Agent()


def wrong(prompt):
    return 1.0
