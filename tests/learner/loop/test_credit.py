"""RUN/credit: which files a run writes, what is in them, and what happens to files of another journal."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.config.ppo import Config
from common.credit_table import CREDIT_SCHEMA, FLOATS
from common.errors import BrokenWeightsError
from common.files import sha256
from common.types import Prompt, Rollout
from learner.loop.credit import rounded
from learner.loop.journal import Journal
from learner.loop.train_loop import train
from tests.fakes import FakeRoles
from tests.learner.loop.test_train_loop import make_run

STEPS = 4


class Ragged(FakeRoles):
    """Responses of one to three tokens, each with log-probabilities of its own."""

    async def write(self, prompt: Prompt) -> Rollout:
        plain, length = await super().write(prompt), 1 + prompt.sample_id.prompt % 3
        ids = np.resize(plain.response_ids, length)
        logprobs = -np.arange(1, length + 1, dtype=np.float32) / (3 + prompt.sample_id.prompt)
        versions = np.full(length, self.version, dtype=np.int32)
        return replace(plain, response_ids=ids, rollout_logprobs=logprobs, policy_versions=versions)


def trained(directory, roles=None, **settings) -> list[str]:
    """Trains to the end. Returns what was reported."""
    said: list[str] = []
    run = make_run(directory, roles or Ragged([]), **{"num_steps": STEPS, "evaluation": {"prompts": 0}, **settings})
    run.heldout, run.report = [], said.append
    asyncio.run(asyncio.wait_for(train(run), 60))
    return said


def written(directory) -> list[str]:
    return sorted(path.name for path in (directory / "credit").glob("*"))


def names(*steps: int) -> list[str]:
    return [f"step-{step:06d}.parquet" for step in steps]


def test_every_step_has_a_file_that_belongs_to_its_journal_file(tmp_path):
    assert trained(tmp_path) == []
    assert written(tmp_path) == names(*range(STEPS))
    for step in Journal(tmp_path / "journal").since(0):
        path = tmp_path / f"credit/step-{step.step:06d}.parquet"
        digest = sha256(tmp_path / f"journal/step-{step.step:06d}.arrow")
        about = json.loads(pq.read_schema(path).metadata[b"ratchet"])
        assert about == {"schema": 2, "step": step.step, "journal": digest}
        table = pq.read_table(path)
        assert table.schema == CREDIT_SCHEMA
        assert table["sample_id"].to_pylist() == step.sample_ids
        assert len(set(step.sample_ids)) == 4
        assert table["policy_version"].to_pylist() == step.table["policy_versions"].to_pylist()
        expected = step.table["rollout_logprobs"].to_pylist()
        for found, row in zip(table["rollout_logprobs"].to_pylist(), expected, strict=True):
            assert found == pytest.approx(row, rel=2**-11)
        assert table["ratio"].to_pylist() == [[0.5] * len(row) for row in expected]
        assert table["values"].null_count == table["td_errors"].null_count == 4


def test_floats_are_rounded_to_ten_bits_of_mantissa():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=1000) * 10.0 ** rng.integers(-30, 30, 1000)).astype(np.float32)
    ties = np.array([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 2 - 2**-12, 0.0, -0.0, 1.0], dtype=np.float32)
    lists = pa.chunked_array([[values.tolist(), None, [], ties.tolist()]], FLOATS)
    found = rounded(lists).to_pylist()
    mantissas, exponents = np.frexp(np.concatenate([values, ties]).astype(np.float64))
    expected = np.ldexp(np.round(mantissas * 2**11) / 2**11, exponents)  # half to even; frexp's mantissa is in [1/2, 1)
    assert found[1:3] == [None, []]
    assert found[0] + found[3] == expected.tolist()
    assert found[3] == [1.0, 1 + 2**-9, -1.0, 2.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(("every", "steps"), [(3, [0, 3]), (9, [0]), (0, [])])
def test_credit_every_thins_the_files_out(every, steps, tmp_path):
    class Asked(Ragged):
        async def credit(self):
            asked.append(self.step - 1)
            return await super().credit()

    asked: list[int] = []
    trained(tmp_path, Asked([]), credit={"every": every})
    assert asked == steps
    assert written(tmp_path) == names(*steps)


def test_a_disk_that_refuses_the_files_is_reported_once(tmp_path):
    """Then it takes them again, and refuses them again."""

    class Disk(Ragged):
        async def update(self, table):
            shutil.rmtree(directory) if directory.is_dir() else directory.unlink(missing_ok=True)
            if self.step != 2:
                directory.write_text("a file where the directory should be")
            return await super().update(table)

    directory = tmp_path / "credit"
    said = trained(tmp_path, Disk([]))
    assert len(said) == 2
    for line, step in zip(said, (0, 3), strict=True):
        assert f"credit/step-{step:06d}.parquet could not be written" in line
        assert f"ratchet replay --credit {step} " in line
    assert Journal(tmp_path / "journal").next_step == STEPS


def test_files_of_another_journal_are_set_aside_when_a_run_continues(tmp_path):
    """A later step, a batch that was cut again, a damaged file; names and links of others stay."""
    trained(tmp_path / "run", num_steps=2)
    trained(tmp_path / "other", seed=1, num_steps=3)
    credit, other = tmp_path / "run/credit", tmp_path / "other/credit"
    shutil.copy(other / names(1)[0], credit)
    shutil.copy(other / names(2)[0], credit)
    (credit / names(7)[0]).write_bytes(b"PAR1")
    pq.write_table(pa.table({"kl": [1.0]}).replace_schema_metadata(None), credit / names(9)[0], store_schema=False)
    (credit / "step-1.parquet").write_text("mine")
    (credit / names(8)[0]).symlink_to(other / names(2)[0])
    said = trained(tmp_path / "run", num_steps=2)
    assert [line.partition(": ")[2].partition(" (")[0] for line in said] == [
        *["it was derived from another journal"] * 2,
        *["it is not a file of token values"] * 2,
    ]
    assert sorted(path.name for path in (tmp_path / "run/set-aside").iterdir()) == ["README.txt", *names(1, 2, 7, 9)]
    assert written(tmp_path / "run") == sorted([*names(0, 8), "step-1.parquet"])


class Breaks(Ragged):
    """The weights are broken after the second update, which the third one finds."""

    async def update(self, table):
        if self.step == 2 and not self.broken:
            self.broken = True
            self.step = 0
            raise BrokenWeightsError("a log-probability is not finite")
        return await super().update(table)

    broken = False


def test_a_step_that_turns_out_to_be_void_loses_its_file(tmp_path):
    trained(tmp_path / "run", Breaks([]))
    assert list(Journal(tmp_path / "run/journal").voided) == [1]
    assert written(tmp_path / "run") == names(0, 2, 3)


def test_a_file_that_a_void_step_kept_through_a_crash_is_set_aside(tmp_path):
    trained(tmp_path / "run", Breaks([]))
    entry = Journal(tmp_path / "run/journal").read(1)
    run = make_run(tmp_path / "run", Ragged([]), num_steps=STEPS, evaluation={"prompts": 0})
    run.credit.write(entry, asyncio.run(_credit_of(entry)))
    assert written(tmp_path / "run") == names(*range(STEPS))
    [said] = trained(tmp_path / "run")
    assert "nothing was learned from its batch" in said
    assert written(tmp_path / "run") == names(0, 2, 3)


async def _credit_of(entry) -> pa.Table:
    roles = Ragged([])
    await roles.update(entry.table)
    return await roles.credit()


def test_credit_may_change_when_a_run_continues(tmp_path):
    trained(tmp_path, num_steps=2, credit={"every": 0})
    trained(tmp_path, num_steps=STEPS, credit={"every": 1})
    assert written(tmp_path) == names(2, 3)
    assert Config.model_fields["credit"].metadata == ["may change on --resume"]
