"""The walk of the README: the files that follow one prompt through the system, and how long they are.

Each file after the first is entered from an earlier one: an earlier file imports it, or imports a file that does.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILES, MAX_LINES = 17, 2460


def listed_files(readme: str) -> list[Path]:
    """The paths of the numbered list in the section "How it fits together"."""
    section = readme.partition("## How it fits together\n")[2].partition("\n## ")[0]
    items = re.findall(r"^\d+\. (.*(?:\n   .*)*)", section, flags=re.MULTILINE)
    return [Path(path) for item in items for path in re.findall(r"`([a-z_/]+\.py)`", item)]


FILES = listed_files((ROOT / "README.md").read_text(encoding="utf-8"))


def imported(path: Path) -> set[Path]:
    """The files of this project that a file imports."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = (Path(*name.split(".")).with_suffix(".py") for name in names)
    return {found for found in paths if (ROOT / found).exists()}


def entered_from(path: Path, earlier: list[Path]) -> bool:
    near = {found for file in earlier for found in imported(file)}
    return path in near or any(path in imported(found) for found in near)


def test_the_list_is_read_from_the_readme():
    assert FILES[0] == Path("deploy/train.py")
    assert len(FILES) == len(set(FILES))
    items = "1. `a/b.py` - one, `c.py`\n   and `d.py`\n2. `e.py`\n\n`f.py`\n"
    text = f"1. `y.py`\n\n## How it fits together\n\n{items}\n## Next\n\n1. `z.py`\n"
    assert listed_files(text) == [Path("a/b.py"), Path("c.py"), Path("d.py"), Path("e.py")]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_of_the_walk_exists_and_is_entered_from_an_earlier_one(path):
    assert (ROOT / path).is_file()
    earlier = FILES[: FILES.index(path)]
    assert not earlier or entered_from(path, earlier), f"none of {list(map(str, earlier))} leads to {path}"


def test_a_file_that_nothing_on_the_way_imports_is_not_entered():
    assert entered_from(Path("learner/loop/buffer.py"), [Path("learner/loop/train_loop.py")])
    assert not entered_from(Path("deploy/submit.py"), FILES)


def test_the_walk_stays_short():
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert len(FILES) <= MAX_FILES
    assert sum(lines.values()) <= MAX_LINES, lines
