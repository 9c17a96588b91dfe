"""Environments that tests play, which fail in every way."""

import asyncio
import os
import sqlite3
import sys
import threading
import time
from collections import Counter
from decimal import Decimal

import numpy as np

from common.environment import Step

closed = Counter()  # closed instances, by class; each test has another one, which its late ones cannot reach


class Counting:
    """Repeats what the model wrote, and gives the number of the turn as reward. Ends after `turns` turns."""

    def __init__(self):
        self.turn, self.closed = 0, closed

    async def reset(self, prompt):
        self.prompt = prompt

    async def step(self, message):
        self.turn += 1
        assert message["role"] == "assistant"
        over = self.turn == self.prompt.fields.get("turns", 3)
        return Step(f"{self.turn}:{message['content']}", float(self.turn), terminated=over, info={"turn": self.turn})

    async def close(self):
        self.closed[type(self).__name__] += 1


class Saving(Counting):
    """Continues in another process."""

    def state(self):
        return self.turn

    def restore(self, state):
        self.turn = state


class Plain:
    """A plain class, whose connection belongs to one thread."""

    def __init__(self):
        self.thread = threading.current_thread()
        self.database = sqlite3.connect(":memory:")

    def reset(self, prompt):
        self.database.execute("CREATE TABLE said (text)")

    def step(self, message):
        self.database.execute("INSERT INTO said VALUES (?)", (message["content"],))
        [(count,)] = self.database.execute("SELECT count(*) FROM said")
        if message["content"] == "a9":
            time.sleep(1000)
        return (f"said {count}", count, False, count == 2, {})

    def close(self):
        assert threading.current_thread() is self.thread
        self.database.close()
        closed["Plain"] += 1


class Asking(Counting):
    """Replaces the prompt by messages, or whatever the prompt's field says."""

    async def reset(self, prompt):
        self.prompt = prompt
        return prompt.fields["reset"]


class AskingUnreadably(Counting):
    """Returns messages whose values cannot be read."""

    async def reset(self, prompt):
        self.prompt = prompt
        return [Failing(role="user", content="Go.")]


async def slow():
    await asyncio.sleep(1000)


def ends_loop():
    sys.exit(3)


async def exits_in_a_task():
    async def work():
        sys.exit(4)

    task = asyncio.create_task(work())
    await asyncio.sleep(0.2)
    return Step("still here" if task.done() else "no")


class Failing(dict):
    """Its values cannot be read."""

    def items(self):
        raise OSError("gone")


class NoTextError(Exception):
    def __str__(self):
        raise RuntimeError


class FailingWithoutText(dict):
    """Its values cannot be read, and the error has no text."""

    def items(self):
        raise NoTextError


STEPS = {
    "raises": lambda: 1 / 0,
    "exits": ends_loop,
    "slow": slow,
    "cancels": lambda: asyncio.current_task().cancel(),
    "blocks": lambda: time.sleep(2),
    "blocks long": lambda: time.sleep(8),
    "exits in a task": exits_in_a_task,
    "text": lambda: "a text",
    "none": lambda: None,
    "short tuple": lambda: ("a", 1.0),
    "reward text": lambda: Step("a", "1"),
    "reward nan": lambda: Step("a", float("nan")),
    "reward huge": lambda: Step("a", 1e300),
    "observation number": lambda: Step(3),
    "observation of numbers": lambda: Step([3]),
    "message without content": lambda: Step([{"role": "user"}]),
    "message with half a pair": lambda: Step([{"role": "user", "content": "\ud800"}]),
    "flag": lambda: Step("a", 1.0, "yes"),
    "flags": lambda: Step("a", 1.0, np.array([True, False])),
    "reward signal": lambda: Step("a", Decimal("sNaN")),
    "message fails": lambda: Step([Failing(role="user", content="a")]),
    "info fails": lambda: Step("a", info=Failing(a=1)),
    "error without text": lambda: Step("a", info=FailingWithoutText(a=1)),
    "info list": lambda: Step("a", info=[1]),
    "info object": lambda: Step("a", info={"a": object()}),
    "info nan": lambda: Step("a", info={"a": float("nan")}),
    "long": lambda: Step("word " * 200),
    "nothing": lambda: Step(),
    "system message": lambda: Step([{"role": "system", "content": "Be kind."}]),
    "messages": lambda: Step([{"role": "tool", "content": "4"}, {"role": "user", "content": "And?"}]),
    "truncated": lambda: Step("a", truncated=True),
}


class Doing(Counting):
    """Each step does what the prompt's field `do` says."""

    async def step(self, message):
        done = STEPS[self.prompt.fields["do"]]()
        return await done if asyncio.iscoroutine(done) else done

    async def close(self):
        await super().close()
        if self.prompt.fields.get("close") == "fails":
            raise RuntimeError(f"no close {self.prompt.seed}")
        if self.prompt.fields.get("close") == "slow":
            await asyncio.sleep(1000)


class ClosingLate(Counting):
    """Its `close` takes as long as the prompt's field `seconds` says."""

    async def close(self):
        await asyncio.sleep(self.prompt.fields["seconds"])
        await super().close()


class SlowStart:
    """Its constructor takes longer than the limit, and its `close` is still called."""

    def __init__(self):
        time.sleep(1)

    def step(self, message):
        return Step()

    def close(self):
        closed["SlowStart"] += 1


class Unpicklable(Counting):
    def state(self):
        return threading.Lock()


class NoPickle:
    def __reduce__(self):
        raise NoTextError


class UnpicklableWithoutText(Counting):
    """Its state cannot be pickled, and the error has no text."""

    def state(self):
        return NoPickle()


class Shuffling(Counting):
    """Changes the prompt that it gets, in place."""

    async def reset(self, prompt):
        await super().reset(prompt)
        prompt.fields["deck"].append(9)
        prompt.messages[0]["content"] = "Changed."


class NoStep:
    async def reset(self, prompt):
        return None


class WithArguments:
    def __init__(self, size):
        self.size = size

    async def step(self, message):
        return Step()


class WrongStep:
    async def step(self):
        return Step()


def made():
    """A function that makes instances."""
    return Counting()


def dies(*_):
    os._exit(7)
