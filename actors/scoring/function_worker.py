"""Calls one reward function for its parent process. Runs in a worker process of a reward replica, or of the driver.

It runs as a script and imports only the standard library, so that the user's modules may have any name. It loads
Ratchet's code by path, under names that no user module has.

usage: python -P function_worker.py FD, where FD is one end of a socket pair. Messages in both directions are pickles,
each after its length. The first message names the function (see `serve`). Its answer says how the function is called,
or why it cannot be called. Each later message is a call, and each answer holds its outcomes.
"""

import asyncio
import ctypes
import importlib.util
import os
import pickle
import signal
import socket
import struct
import sys
from importlib.machinery import ModuleSpec, PathFinder

HEADER = struct.Struct("!Q")
RATCHET = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def load_file(name, path):
    """The module in a file, under this name."""
    spec = importlib.util.spec_from_file_location(name, path)  # a package, if the file is an __init__.py
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load_file("_ratchet_user_code", os.path.join(RATCHET, "common", "user_code", "__init__.py"))
calls = importlib.import_module("_ratchet_user_code.calls")
packages = importlib.import_module("_ratchet_user_code.packages")
UserCodeError = importlib.import_module("_ratchet_user_code.errors").UserCodeError
INPUT_FILE = os.path.join(RATCHET, "common", "reward_input.py")
reward_input = load_file("_ratchet_reward_input", INPUT_FILE)


class UsersFirst:
    """Finds the user's packages that have the same names as Ratchet's. This includes packages without an __init__.py,
    which Python would find only after all packages that have one. A module that the user's package lacks is taken from
    Ratchet's package of that name."""

    def __init__(self, directories):
        self.directories = directories

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, self.directories) if name in packages.RATCHET_PACKAGES else None
        if spec is None or spec.submodule_search_locations is None:
            return spec
        found = [*spec.submodule_search_locations, os.path.join(RATCHET, name)]
        if spec.loader is None:
            spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = found
        return spec


def main():
    """Serves the parent until it closes the connection or ends."""
    end_with_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    stream = connection.makefile("rb")
    serve(stream, connection, receive(stream))


def end_with_parent():
    """Has the kernel kill this process when its parent ends, even in the middle of a call."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def receive(stream):
    """The next message; None when the parent has closed the connection."""
    header = stream.read(HEADER.size)
    return pickle.loads(stream.read(*HEADER.unpack(header))) if len(header) == HEADER.size else None


def send(connection, message):
    """Sends one message."""
    connection.sendall(frame(message))


def frame(message):
    """The bytes of a message: the length of its pickle, then the pickle."""
    data = pickle.dumps(message)
    return HEADER.pack(len(data)) + data


def serve(stream, connection, first):
    """Answers messages until the parent closes the connection. `first` is the first message. It holds:
    `function` (module:function); `takes` (see call_style in common/user_code/calls.py); `path`, the new sys.path;
    `limit_s`, the time limit of a call; `users`, the directories where the user's packages may have the same names as
    Ratchet's, or None if Ratchet's packages must be found first, as in Ratchet's own processes."""
    sys.path[:] = first["path"]
    sys.argv = [""]
    if first["users"] is None:
        packages.import_ratchet_first()
    else:
        sys.meta_path.insert(0, UsersFirst(first["users"]))
    try:
        function = calls.find_function(first["function"])
        style = calls.call_style(function, first["takes"])
    except UserCodeError as error:
        send(connection, {"error": vars(error)})
        return
    send(connection, {"style": (style.is_async, style.takes_list)})
    if style.is_async:
        asyncio.run(serve_async(connection, function, style, first["limit_s"]))
        return
    while (message := receive(stream)) is not None:
        try:
            reply = as_reply(calls.call(function, style, inputs(message)))
        except UserCodeError as error:
            reply = {"error": vars(error)}
        send(connection, {"id": message["id"], **reply})


async def serve_async(connection, function, style, limit_s):
    """Like the end of `serve`, but calls overlap, and a call that passes its limit is cancelled."""
    # From here only asyncio uses the connection: it makes the socket non-blocking, where `sendall` fails when the
    # socket's buffer is full.
    reader, writer = await asyncio.open_connection(sock=connection)
    tasks = set()

    async def serve_one(message):
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                reply = as_reply(await calls.call_async(function, style, inputs(message)))
        except UserCodeError as error:
            reply = {"error": vars(error)}
        except TimeoutError:
            reply = {"too_long": True}
        writer.write(frame({"id": message["id"], **reply}))

    while True:
        try:
            header = await reader.readexactly(HEADER.size)
            message = pickle.loads(await reader.readexactly(*HEADER.unpack(header)))
        except asyncio.IncompleteReadError:
            os._exit(0)  # the parent has ended, so no process waits for the calls that still run
        task = asyncio.create_task(serve_one(message))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def inputs(message):
    """The answers as RewardInput. If user code has imported that class from Ratchet's `common`, this is the same class,
    so that isinstance works."""
    imported = sys.modules.get("common.reward_input", reward_input)
    module = imported if imported.__file__ == INPUT_FILE else reward_input
    return [module.RewardInput(**answer) for answer in message["answers"]]


def as_reply(outcomes):
    """Outcomes in Python's own types, because the parent has a different UserCodeError class."""
    return {"outcomes": [vars(found) if isinstance(found, UserCodeError) else found for found in outcomes]}


if __name__ == "__main__":
    main()
