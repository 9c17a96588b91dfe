"""One made run with hostile texts, and its report, for all tests of this directory."""

from __future__ import annotations

import json
import re

import pytest

from deploy.report.page import render
from deploy.report.report import page_blocks
from deploy.report.run_files import RunFiles
from tests.deploy.report.made_run import write_run

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 2">',
    "before\u2028after\u2029end",
    "\u202egnp.exe\u2066 \u200f",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07",
    "<b>bold</b> &lt;i&gt; {{x}} ${x} @{y}",
)


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory):
    """Six steps of eight rollouts. Every prompt is asked twice; the prompts, voids and replicas say hostile things."""
    voids = [("0/1/0", f"grader: {HOSTILE[1]}{HOSTILE[4]}", HOSTILE[0]), ("0/2/0", "timeout", None)]
    return write_run(
        tmp_path_factory.mktemp("runs") / "run <i>", prompts=24, prompt=" ".join(HOSTILE), voids=voids, tokens=(12, 30)
    )


@pytest.fixture(scope="session")
def blocks(run_directory):
    return page_blocks(RunFiles.read(run_directory))


@pytest.fixture(scope="session")
def page(blocks):
    return render("run <i>", blocks)


def data_of(text):
    """The data blocks of a page, as a browser would read them."""
    found = re.findall(r'<script type="application/json" id="(\w+)-data">(.*?)</script>', text, flags=re.S)
    return {name: json.loads(value) for name, value in found}
