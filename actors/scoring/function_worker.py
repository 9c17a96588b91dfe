"""A worker process that calls one reward function for its parent. Run as a script, never imported by Ratchet: only the
standard library, so that the user's modules may have any name.

usage: python -P function_worker.py FD, with FD one end of a socket pair. Messages both ways are pickles with their
lengths before them. The first one says which function (see `serve`); the answer says how it is called, or why it cannot
be. From then on each message is a call, and each answer its outcomes.
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
OURS = ("actors", "common", "deploy", "learner")


def load_file(name, path):
    """A module by its path, under a name that no user's module has."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


user_code = load_file("_ratchet_user_code", os.path.join(RATCHET, "common", "user_code", "calls.py"))
INPUT_FILE = os.path.join(RATCHET, "common", "reward_input.py")
reward_input = load_file("_ratchet_reward_input", INPUT_FILE)


def input_class():
    """RewardInput: the class that user code imports from Ratchet's `common`, if it does, so that isinstance works."""
    imported = sys.modules.get("common.reward_input", reward_input)
    return (imported if imported.__file__ == INPUT_FILE else reward_input).RewardInput


class UsersFirst:
    """Finds the user's packages of the names that Ratchet's have, also those without an __init__.py, which Python puts
    behind every package that has one. Modules that are only in Ratchet's are found in them too."""

    def __init__(self, directories):
        self.directories = directories

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, self.directories) if name in OURS else None
        if spec is None or spec.submodule_search_locations is None:
            return spec
        found = [*spec.submodule_search_locations, os.path.join(RATCHET, name)]
        if spec.loader is None:
            spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = found
        return spec


def main():
    end_with_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    stream = connection.makefile("rb")
    serve(stream, connection, receive(stream))


def end_with_parent():
    """The kernel kills this process when its parent is gone, also in the middle of a call."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def receive(stream):
    header = stream.read(HEADER.size)
    return pickle.loads(stream.read(*HEADER.unpack(header))) if len(header) == HEADER.size else None


def send(connection, message):
    data = pickle.dumps(message)
    connection.sendall(HEADER.pack(len(data)) + data)


def serve(stream, connection, first):
    """`first` holds function (module:function), takes (see common/user_code/calls.py), path (for sys.path), limit_s,
    and
    users: directories where a user's packages may have names of Ratchet's. None: Ratchet's come first, as in its own
    processes."""
    sys.path[:] = first["path"]
    sys.argv = [""]
    if first["users"] is None:
        for package in OURS:
            importlib.import_module(package)
    else:
        sys.meta_path.insert(0, UsersFirst(first["users"]))
    try:
        function = user_code.find_function(first["function"])
        form = user_code.form_of(function, first["takes"])
    except user_code.UserCodeError as error:
        send(connection, {"refused": fault(error), "missing": getattr(error, "missing", None)})
        return
    send(connection, {"form": (form.is_async, form.takes_list)})
    if form.is_async:
        asyncio.run(serve_async(connection, function, form, first["limit_s"]))
        return
    while (message := receive(stream)) is not None:
        try:
            answers = [input_class()(**answer) for answer in message["answers"]]
            outcomes = user_code.call(function, form, answers)
        except user_code.UserCodeError as error:
            send(connection, {"id": message["id"], "failed": fault(error)})
        else:
            send(connection, {"id": message["id"], "outcomes": [plain(outcome) for outcome in outcomes]})


async def serve_async(connection, function, form, limit_s):
    """Calls overlap, and each is cancelled past its limit."""
    reader, _ = await asyncio.open_connection(sock=connection.dup())
    calls = set()

    async def call(message):
        limit = asyncio.timeout(limit_s)
        try:
            answers = [input_class()(**answer) for answer in message["answers"]]
            async with limit:
                outcomes = await user_code.call_async(function, form, answers)
        except user_code.UserCodeError as error:
            send(connection, {"id": message["id"], "failed": fault(error)})
        except TimeoutError:
            send(connection, {"id": message["id"], "too_long": True})
        else:
            send(connection, {"id": message["id"], "outcomes": [plain(outcome) for outcome in outcomes]})

    while True:
        try:
            header = await reader.readexactly(HEADER.size)
            message = pickle.loads(await reader.readexactly(*HEADER.unpack(header)))
        except asyncio.IncompleteReadError:
            os._exit(0)  # the parent is gone, and nobody waits for what goes on
        task = asyncio.create_task(call(message))
        calls.add(task)
        task.add_done_callback(calls.discard)


def plain(outcome):
    return {"fault": fault(outcome)} if isinstance(outcome, user_code.UserCodeError) else outcome


def fault(error):
    return (error.reason, error.details, error.fault)


if __name__ == "__main__":
    main()
