"""Places in running code: which lines of some functions a run executes, and something to do before one of them.

`sys.settrace` calls us before every line. Only frames of the chosen functions are followed; others cost one look-up.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType
from typing import Any


@dataclass(frozen=True, order=True)
class Place:
    """Before the `hit`-th time that a run executes this line."""

    function: str
    line: int
    hit: int

    def __str__(self) -> str:
        return f"{self.function}, line {self.line}, hit {self.hit}"


def code_of(functions: Iterable[Any]) -> dict[CodeType, str]:
    """The code of these functions, and of every function inside them, with its name."""
    found: dict[CodeType, str] = {}

    def add(code: CodeType, module: str) -> None:
        found[code] = f"{module}.{code.co_qualname}"
        for constant in code.co_consts:
            if inspect.iscode(constant):
                add(constant, module)

    for function in functions:
        plain = inspect.unwrap(function.fget if isinstance(function, property) else function)
        assert isinstance(plain, FunctionType), function
        add(plain.__code__, plain.__module__)
    return found


def functions_of(*owners: Any) -> list[Any]:
    """All functions that modules and classes define themselves, methods of their classes included."""
    found: list[Any] = []
    for owner in owners:
        module = owner.__name__ if inspect.ismodule(owner) else owner.__module__
        for value in vars(owner).values():
            value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if isinstance(value, (FunctionType, property)) and _module_of(value) == module:
                found.append(value)
            elif inspect.isclass(value) and inspect.ismodule(owner) and value.__module__ == module:
                found += functions_of(value)
    return found


def _module_of(value: Any) -> str:
    return (value.fget if isinstance(value, property) else value).__module__


@contextmanager
def before_every_line(codes: dict[CodeType, str], do: Callable[[Place], None]) -> Iterator[None]:
    """Calls `do` before each line of the `codes`, in all threads that start meanwhile. If it raises an error, the line
    raises it, and this thread is not followed any more."""
    hits: Counter[tuple[str, int]] = Counter()

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            key = (codes[frame.f_code], frame.f_lineno)
            hits[key] += 1
            do(Place(*key, hits[key]))
        return line

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        return line if frame.f_code in codes else None

    before = sys.gettrace()
    threading.settrace(call)
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
        threading.settrace(before)  # type: ignore[arg-type]


def chosen(seen: Iterable[Place]) -> list[Place]:
    """The first, second, middle and last hit of each line."""
    most: dict[tuple[str, int], int] = {}
    for place in seen:
        key = (place.function, place.line)
        most[key] = max(most.get(key, 0), place.hit)
    return sorted(
        {
            Place(function, line, hit)
            for (function, line), last in most.items()
            for hit in {1, min(2, last), (last + 1) // 2, last}
        }
    )
