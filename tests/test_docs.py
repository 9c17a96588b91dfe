"""README, CONTRIBUTING and docs name files, tests and settings that exist, and their Python blocks run unchanged.

The blocks run against a small run and must give the right values.
"""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import typer.main

from common.config.ppo import Config
from common.credit_table import CREDIT_SCHEMA
from common.files import read_records
from common.metrics.table import STEP
from common.types import Prompt, RewardInput, Rollout, RolloutRef, Score, Void
from deploy import cli
from learner.loop.journal import Journal
from learner.loop.train_loop import train
from tests.fakes import END, FakeRoles
from tests.learner.loop.test_train_loop import make_run

ROOT = Path(__file__).parent.parent


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)


TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in TEXTS if blocks(page, "python")]
PATH = re.compile(r"`((?:actors|common|learner|deploy|tests|docs|\.ci)/[\w./-]*)(?:::(\w+))?`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_every_file_and_test_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    assert {link for link in LINK.findall(text) if not (page.parent / link).exists()} == set()
    named = PATH.findall(text)
    keys = {metric.key for metric in STEP}  # one of them looks like a path
    assert {path for path, _ in named if not (ROOT / path).exists()} - keys == set()
    tests = [(path, test) for path, test in named if test]
    assert [pair for pair in tests if f"def {pair[1]}(" not in (ROOT / pair[0]).read_text(encoding="utf-8")] == []


def test_the_readme_links_to_every_page():
    links = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} | {"CONTRIBUTING.md", "LICENSE"} <= set(links)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_every_shell_line_names_a_command_and_files_that_exist(page):
    known = typer.main.get_command(cli.app).commands.keys()
    lines = "\n".join(re.findall(r"^```\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S))
    assert set(re.findall(r"^ratchet +([a-z-]+)", lines, flags=re.M)) - {"embedded"} <= known  # "ratchet embedded:..."
    assert {name for name in re.findall(r"\bdeploy/\S+\.toml", lines) if not (ROOT / name).exists()} == set()


def test_the_config_in_the_readme_is_valid():
    complete, more_sources = blocks(ROOT / "README.md", "toml")
    cfg = Config.model_validate(tomllib.loads(complete + more_sources))
    assert [source.name for source in cfg.reward.sources] == ["exact", "helpful", "judge", "unfinished"]
    assert cfg.prompts.format == "chat"


class Writers(FakeRoles):
    """Two generators, some responses cut off, scores that differ, one void."""

    async def write(self, prompt: Prompt) -> Rollout:
        rollout = await super().write(prompt)
        number = prompt.sample_id.prompt
        if number % 3 == 0:
            rollout = replace(rollout, finish_reason="length")
        return replace(rollout, generator=f"Generator({number % 2})")

    async def score(self, ref: RolloutRef) -> Score | Void:
        number = ref.sample_id.prompt
        if number == 5:
            return Void(ref.sample_id, "told to fail", response="five")
        return Score(number / 8, {"exact": number / 4}, {"exact": "tasks:exact"})


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("docs") / "RUN"
    run = make_run(directory, Writers([]), num_steps=3, evaluation={"prompts": 0})
    run.heldout = []
    run.decode = lambda responses: [f"text {ids[0]}" for ids in responses]
    asyncio.run(train(run))
    (directory / "config.toml").write_text(run.cfg.to_toml())
    return directory


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_runs(page, run_directory, monkeypatch):
    monkeypatch.chdir(run_directory.parent)
    names: dict[str, Any] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, Python block {number}", "exec"), names)
    CHECKS.get(page.name, lambda names, run_directory: None)(names, run_directory)


def check_reward(names: dict[str, Any], run_directory: Path) -> None:
    assert names["exact"](RewardInput("2 + 2?", " 4\n", 2, "stop", {"answer": "4"})) == 1.0
    assert names["exact"](RewardInput("2 + 2?", "5", 2, "stop", {"answer": "4"})) == 0.0


def check_reading(names: dict[str, Any], run_directory: Path) -> None:
    steps = list(Journal(run_directory / "journal").since(0))
    records = read_records(run_directory / "metrics.jsonl")
    rows = [row for step in steps for row in step.table.to_pylist()]
    assert {row["generator"] for row in rows} == {"Generator(0)", "Generator(1)"}
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}

    assert names["curve"]["rollout/score/mean"].tolist() == [record["rollout/score/mean"] for record in records]
    assert [time.timestamp() for time in names["curve"]["time"]] == pytest.approx([r["time"] for r in records])
    ordered = sorted(row["score"] for row in rows)
    assert names["worst"]["score"].tolist() == ordered[:10]
    for row in names["worst"].itertuples():
        assert row.response == f"text {4 + int(row.prompt[1:]) % 20}"  # what the fake writes to this prompt

    by_step = names["by_step"]
    assert by_step["step"].tolist() == [0, 1, 2]
    for step, score, tokens in by_step.itertuples(index=False):
        batch = [row for row in rows if row["step"] == step]
        assert score == pytest.approx(sum(row["score"] for row in batch) / len(batch))
        assert tokens == 2  # one word and the end token
    cut_off = sorted((row["step"], row["response"]) for row in rows if row["finish_reason"] == "length")
    assert sorted(names["cut_off"].itertuples(index=False, name=None)) == cut_off
    assert len(cut_off) > 0
    assert names["waited"]["seconds"].tolist() == pytest.approx([record["wait/learner_s"] for record in records])

    metadata = json.loads(pa.ipc.open_file(run_directory / "journal/step-000002.arrow").schema.metadata[b"ratchet"])
    assert names["metadata"] == metadata
    assert names["voids"] == [reason for _, reason, _ in metadata["voids"]]
    found = [void for step in steps for void in step.voids]
    assert {reason for _, reason in found} == {"told to fail"}


def check_credit(names: dict[str, Any], run_directory: Path) -> None:
    [*_, step] = Journal(run_directory / "journal").since(0)
    assert names["credit"]["sample_id"].tolist() == step.sample_ids
    assert names["journal"]["response_ids"].map(len).tolist() == names["credit"]["kl"].map(len).tolist() == [2] * 4
    assert set(names["first"].columns) == set(CREDIT_SCHEMA.names) - {"sample_id", "values", "td_errors"}
    assert names["first"]["ratio"].tolist() == [0.5, 0.5]
    assert names["first"]["policy_version"].tolist() == [2, 2]
    assert len(names["tokens"]) == 3 * 4 * 2
    assert names["tokens"]["advantage"].tolist() == [0.5] * 24


CHECKS = {"README.md": check_reward, "metrics.md": check_reading, "credit.md": check_credit}


def test_maps_of_the_journal_are_readable_as_the_docs_say(run_directory):
    import duckdb
    import pyarrow.dataset

    files = sorted((run_directory / "journal").glob("step-*.arrow"))
    rollouts = pyarrow.dataset.dataset([str(file) for file in files], format="ipc")
    asking = duckdb.connect().register("rollouts", rollouts)
    found = asking.sql(
        "select components['exact'] as exact, origins['exact'] as origin, score from rollouts"
    ).fetchall()
    assert len(found) == 12
    assert all(exact == 2 * score and origin == "tasks:exact" for exact, origin, score in found)
    journal = pd.concat(map(pd.read_feather, files))
    assert [dict(row.components)["exact"] for row in journal.itertuples()] == (2 * journal["score"]).tolist()
    assert END in journal["response_ids"].iloc[0]
