"""Lists the tasks of a verifiers taskset. Runs in a process of its own, which the driver starts for each source.

It reads one request, a JSON object, and prints one JSON object per line: a record for each task. If the taskset cannot
be used, the last line has the reason under `error`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

HELD_OUT = 5  # one task in this many
MOST_TASKS = 100_000  # most tasks that are read, because a taskset may be endless; they include the held-out ones


def main() -> None:
    request, output = json.load(sys.stdin), sys.stdout
    sys.path[:] = request.pop("path")
    sys.stdout = sys.stderr  # a taskset may print
    try:
        for found in records(**request):
            output.write(f"{json.dumps(found)}\n")
    except (Exception, SystemExit) as error:
        output.write(f"{json.dumps({'error': f'{type(error).__name__}: {error}'})}\n")
    output.flush()


def records(taskset: str, heldout: bool) -> Iterator[dict[str, Any]]:
    """The tasks of training, or those that are held out, each with its prompt and its data."""
    import verifiers.v1 as vf

    config = vf.taskset_config_type(taskset).model_validate({"id": taskset})
    for task in itertools.islice(vf.load_taskset(config), MOST_TASKS):
        if is_held_out(task.key) == heldout:
            data = task.data.model_dump(mode="json", exclude_none=True)
            yield {"prompt": prompt_of(data), "verifiers": {"taskset": taskset, "task": data}}


def is_held_out(key: str) -> bool:
    """True for one task in HELD_OUT, by the hash of its key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % HELD_OUT == 0


def prompt_of(data: dict[str, Any]) -> list[dict[str, str]]:
    """The first messages of a task, as text. In a rollout, the package's first request replaces them."""
    prompt = data.get("prompt") or data.get("description") or data.get("name") or f"Task {data.get('idx')}"
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    before = [{"role": "system", "content": data["system_prompt"]}] if data.get("system_prompt") else []
    return [*before, *({"role": each["role"], "content": _text(each.get("content"))} for each in messages)]


def _text(content: Any) -> str:
    parts = [{"text": content}] if isinstance(content, str) else content or []
    return "".join(part.get("text") or "" for part in parts)


if __name__ == "__main__":
    main()
