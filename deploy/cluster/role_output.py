"""The output of the roles' processes on every node, line by line. Runs in the driver.

Ray's log monitors read the output of each process and publish it. With `log_to_driver` Ray prints it on the terminal;
deploy/cluster/connection.py turns this off, and the lines come here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

QUIET_S, MOST_S = 0.5, 3.0  # a log monitor reads every 0.1 s, and then sends the lines


@contextmanager
def role_output_to(write: Callable[[str, str], None]) -> Iterator[None]:
    """During the block, calls `write` with the name of a process and a line that it has printed. After an error it
    waits for the last lines: a process that died may have printed why."""
    newest, lock = time.monotonic(), threading.Lock()

    def took(printed: Mapping[str, Any]) -> None:
        nonlocal newest
        if not str(printed.get("pid")).isdecimal():  # Ray's own, such as a line every 5 s about free resources
            return
        newest = time.monotonic()
        where = "" if printed.get("ip") == printed.get("localhost") else f" on {printed.get('ip')}"
        name = printed.get("actor_name") or printed.get("task_name") or "process"
        with lock:
            for line in printed["lines"]:
                if text := str(line).rpartition("\r")[2].rstrip():  # a progress bar overwrites the text before it
                    write(f"{name} (pid {printed['pid']}{where})", text)

    handler = f"ratchet-{id(took)}"
    dispatcher.add_handler(handler, took)
    try:
        yield
    except Exception:  # any error: the traceback of a process that died may still be on its way
        until = time.monotonic() + MOST_S
        while time.monotonic() < min(until, max(newest, until - MOST_S) + QUIET_S):
            time.sleep(0.05)
        raise
    finally:
        dispatcher.remove_handler(handler)
