"""A journal of the starting policy with fakes: which prompts it has, that a kill loses nothing, and what audits it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from common.errors import UserError
from deploy.audit import run_audit
from deploy.replay import run_replay
from deploy.report.report import page_blocks
from deploy.report.run_files import RunFiles
from deploy.run.directory import sole_owner
from deploy.run.finished import finished_training
from deploy.run.start import new_start
from learner.loop.journal import Journal
from learner.loop.notes import learns
from learner.loop.prompts import PromptRecord, PromptStream
from learner.loop.sampling import Sampling, sample
from learner.proof.audit import audit
from learner.proof.chain import Violation
from tests.fakes import FakeRoles, tiny_config
from tests.learner.proof.forge import forge_step, replace_column

NUM_PROMPTS, VOID_PROMPT = 10, 7
RECORDS = [PromptRecord(f"q{i}", np.array([3, 4], dtype=np.int32), {}) for i in range(NUM_PROMPTS)]


class Killed(Exception):
    """Stands for a kill of the process."""


def config(**overrides):
    return tiny_config("unused", rollouts_per_step=4, **overrides)


def stream(cfg) -> PromptStream:
    return PromptStream(RECORDS, seed=cfg.seed, rollouts_per_prompt=1)


def begin(directory: Path, cfg) -> None:
    with sole_owner(directory) as owned:
        owned.begin(cfg, "train-critic", force=False)
        new_start(directory, cfg, {"model": "1234"}, stream(cfg), learns=False).record()


def sampled(directory: Path, cfg, responses: int, roles: FakeRoles | None = None, **about) -> Sampling:
    roles = roles or FakeRoles([], fail_prompts=frozenset({VOID_PROMPT}))
    run = Sampling(cfg, directory, stream(cfg), roles, roles, **about)
    asyncio.run(sample(run, responses))
    return run


def rows(directory: Path) -> list[str]:
    return [sample_id for step in Journal(directory / "journal").since(0) for sample_id in step.sample_ids]


def expected_rows(seed: int, count: int) -> list[str]:
    """The first `count` samples whose prompt gets a score, in the order of the epochs' permutations."""
    ids = [f"{e}/{i}/0" for e in range(9) for i in np.random.default_rng([seed, e]).permutation(NUM_PROMPTS)]
    return [sample_id for sample_id in ids if f"/{VOID_PROMPT}/" not in sample_id][:count]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """14 responses in batches of 4, one prompt of each epoch void."""
    directory, cfg = tmp_path_factory.mktemp("runs") / "critic", config(seed=3)
    begin(directory, cfg)
    sampled(directory, cfg, 14)
    return directory


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "critic"))


def test_the_journal_has_the_first_prompts_of_the_stream_in_order(made):
    assert rows(made) == expected_rows(3, 14)


def test_every_batch_is_of_version_0_and_without_a_reference(made):
    steps = list(Journal(made / "journal").since(0))
    assert [step.table.num_rows for step in steps] == [4, 4, 4, 2]
    assert [step.policy_version for step in steps] == [0, 0, 0, 0]
    for step in steps:
        assert step.table["ref_logprobs"].null_count == step.table.num_rows
        assert {version for row in step.table["policy_versions"].to_pylist() for version in row} == {0}
    assert not learns(Journal(made / "journal").notes)
    voids = [sample_id for step in steps for sample_id, reason in step.voids if reason == "told to fail"]
    assert voids
    assert {sample_id.split("/")[1] for sample_id in voids} == {str(VOID_PROMPT)}


def test_a_sampling_that_was_killed_keeps_each_response_once(tmp_path):
    cfg = config(seed=3)
    begin(tmp_path / "critic", cfg)

    def killed(done: int, table: pa.Table, voids: list) -> None:
        raise Killed

    for finished in (4, 8, 12):
        with pytest.raises(Killed):
            sampled(tmp_path / "critic", cfg, 14, on_batch=killed)
        assert len(rows(tmp_path / "critic")) == finished
    sampled(tmp_path / "critic", cfg, 14)
    assert rows(tmp_path / "critic") == expected_rows(3, 14)
    roles = FakeRoles([])
    sampled(tmp_path / "critic", cfg, 14, roles)
    assert roles.events == []  # nothing is missing, so nothing is asked


def test_the_next_batch_is_written_while_one_is_cut(tmp_path):
    cfg, events = config(), []
    begin(tmp_path / "critic", cfg)
    roles = FakeRoles(events)
    sampled(tmp_path / "critic", cfg, 8, roles, on_batch=lambda done, table, voids: events.append(f"batch {done}"))
    assert events.index("batch 4") > 4
    assert events[-1] == "batch 8"
    assert events.count("generate v0") == 8


def test_a_reward_that_fails_too_often_ends_the_sampling(tmp_path):
    cfg = config()
    begin(tmp_path / "critic", cfg)
    with pytest.raises(UserError, match="max_void_share"):
        sampled(tmp_path / "critic", cfg, 8, FakeRoles([], fail_prompts=frozenset(range(NUM_PROMPTS))))


def test_the_audit_proves_a_sampled_journal(made, capsys):
    assert run_audit(made) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "14 in the journal once" in text
    assert "28 tokens; the oldest: 0" in text
    assert [line.rule for line in audit(made).proved] == ["chain", "samples", "versions"]


def _version(table, about):
    about["policy_version"] = 1
    return table


def _newer_tokens(table, about):
    return replace_column(table, "policy_versions", [[1, 1]] * table.num_rows)


def _measured(table, about):
    return replace_column(table, "ref_logprobs", [[-1.0, -1.0]] * table.num_rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [(_version, "learner had version 1"), (_newer_tokens, "version 1, newer than 0"), (_measured, "needs none")],
)
def test_the_audit_finds_what_a_sampled_journal_cannot_have(run, change, message):
    forge_step(run, 1, change)
    with pytest.raises(Violation, match=message):
        audit(run)


def test_nothing_replays_or_continues_a_policy_that_never_learned(made, tmp_path):
    with pytest.raises(UserError, match="no policy learned from them"):
        run_replay(made, tmp_path / "policy")
    with pytest.raises(UserError, match="no policy learned from them"):
        run_audit(made, replay=True)
    with pytest.raises(UserError, match="made by ratchet train-critic"):
        finished_training(config(), made)


def test_the_report_shows_the_responses_of_a_sampled_journal(made):
    blocks = page_blocks(RunFiles.read(made))
    assert blocks["rollouts"]["kept"]["all"][0] == 14 + 1  # a void one counts
    assert blocks["curves"] == []
