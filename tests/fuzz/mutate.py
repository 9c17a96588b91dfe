"""Seeded changes to texts, bytes and trees of values. Most are small: an input that is refused at once tests little."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

# Texts that often break programs: empty, invisible, undecodable, very long, or like a number or a path.
ODD_TEXTS = (
    "", " ", "\n", "\t", "\0", "\x1b[31m", "\ufeff", "\u2028", "\u202e", "\ufffd", "\U0001f600", "e\u0301" * 20, "ß",
    "nan", "inf", "-inf", "1e999", "-0", "0x10", "1_000", "true", "null", "None", "[]", "{}", "{", "[[", '"', "'''",
    "#", "../..", "/dev/null", "/", "~", ".", "*", "a/b/c", "C:\\x", "http://127.0.0.1:1/", "module:function", ":",
    "a:b:c", "%s", "{0}", "[red]", "<|im_end|>", "<end>", "x" * 5000,
)  # fmt: skip
ODD_NUMBERS = (0, -1, 1, 2, 3, 127, 2**31, 2**63 - 1, 2**70, 0.0, -0.0, 0.1, 1e-320, 1e308, float("nan"), float("inf"))
SURROGATE = "\ud800"  # half a character, as JSON can write it


def odd_value(rng: Random, *, json_only: bool = False) -> Any:
    """A value that a user seldom means. With `json_only` also values that only JSON can write."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(ODD_TEXTS)
    if kind < 5:
        return rng.choice(ODD_NUMBERS)
    if kind == 5:
        return rng.choice([True, False])
    nested: Any = rng.choice([[], {}, [[]], [1, "a"], {"a": 1}, {"": {}}, [{}]])
    if not json_only or kind == 6:
        return copy.deepcopy(nested)
    return rng.choice([None, SURROGATE, [None], {"a": None}])


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a tree of dicts and lists, without the empty path of the tree itself."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in items:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def mutate_tree(rng: Random, tree: Any, *, changes: int = 2, json_only: bool = False) -> Any:
    """A copy with up to `changes` values replaced, removed, renamed, repeated or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, changes)):
        paths = places(tree)
        if not paths:
            return odd_value(rng, json_only=json_only)
        *parents, key = rng.choice(paths)
        owner = tree
        for parent in parents:
            owner = owner[parent]
        change = rng.randrange(7)
        if change < 3:
            owner[key] = odd_value(rng, json_only=json_only)
        elif change == 3:
            del owner[key]
        elif change == 4 and isinstance(owner, dict):
            owner[rng.choice([*ODD_TEXTS[:20], f"{key}s", str(key).upper()])] = owner.pop(key)
        elif change == 5:
            owner[key] = rng.choice([[owner[key]], {"a": owner[key]}, [owner[key]] * 3, str(owner[key])])
        else:
            other = tree
            for step in rng.choice(paths):
                if not isinstance(other, (dict, list)) or (isinstance(other, list) and step >= len(other)):
                    break
                if isinstance(other, dict) and step not in other:
                    break
                other = other[step]
            owner[key] = copy.deepcopy(other)
    return tree


def mutate_text(rng: Random, text: str) -> str:
    """Lines swapped, repeated, removed or joined; a span replaced by odd text; brackets a thousand deep."""
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    change = rng.randrange(7)
    if change == 0:
        del lines[at]
    elif change == 1:
        lines.insert(at, rng.choice(lines))
    elif change == 2:
        lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    elif change == 3:
        lines.insert(at, rng.choice(ODD_TEXTS))
    elif change == 4:
        start = rng.randrange(len(lines[at]) + 1)
        end = min(len(lines[at]), start + rng.randrange(6))
        lines[at] = lines[at][:start] + rng.choice(ODD_TEXTS) + lines[at][end:]
    elif change == 5:
        start = rng.randrange(len(lines[at]) + 1)
        depth = rng.choice([2, 50, 3000, 100_000])
        lines[at] = lines[at][:start] + rng.choice("[{(") * depth + lines[at][start:]
    else:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    return "\n".join(lines)


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """Bytes flipped, cut off, removed, repeated or inserted; another encoding or line end."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice([1, 1, 2, 8, 100]))
    change = rng.randrange(9)
    if change == 0:
        return data[:start]
    if change == 1:
        return data[:start] + data[end:]
    if change == 2:
        return data[:end] + data[start:]
    if change == 3:
        return data[:start] + rng.randbytes(end - start) + data[end:]
    if change == 4:
        return data[:start] + rng.choice([b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\r", b"\x1a"]) + data[start:]
    if change == 5:
        return b"\xef\xbb\xbf" + data
    if change == 6:
        return data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))
    if change == 7:
        return data.replace(b"\n", b"\r\n")
    return rng.randbytes(rng.randrange(64))


def json_text(rng: Random, tree: Any) -> str:
    """A tree as JSON. Sometimes it is not valid: NaN, raw characters, or a key that occurs twice."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + ", " + text[1:]
    return text
