"""Checks the values of tokens against the journal. Runs in `ratchet audit`, and in rank 0 of a replay."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common.credit_table import CREDIT_SCHEMA, NULL_COLUMNS, NULL_ROWS, SCHEMA_VERSION
from common.experience_table import response_masks
from learner.proof.chain import Step, Violation

RULE = "credit"
ROUNDING = 2.0**-11  # relative
_NAME = re.compile(r"step-(\d{6,})\.parquet")


class Credit:
    """Compares each file of RUN/credit with its batch. Any file may be missing."""

    def __init__(self, directory: Path) -> None:
        found = sorted(directory.iterdir()) if directory.is_dir() else []
        self._paths = {
            int(match[1]): path for path in found if (match := _NAME.fullmatch(path.name)) and not path.is_symlink()
        }
        self.files = self.tokens = 0  # compared
        self._fault: Violation | None = None  # the first one

    def take(self, step: Step) -> None:
        """Checks the file of a step. Only `finish` raises what is found, because a fault of the batch itself matters
        more."""
        if self._fault is None and (path := self._paths.get(step.number)) is not None:
            try:
                self._check(path, step)
            except Violation as fault:
                self._fault = fault

    def _check(self, path: Path, step: Step) -> None:
        table = _read(path, step)
        if table["sample_id"].to_pylist() != step.sample_ids:
            raise Violation(RULE, f"{path} has other rollouts than its journal file, or another order")
        lengths = pa.array([int(mask.sum()) for mask in response_masks(step.table)], pa.int32())
        for name in CREDIT_SCHEMA.names[1:]:
            if not pc.all(pc.equal(pc.list_value_length(table[name]), lengths), min_count=0).as_py():
                raise Violation(RULE, f"{path}: {name} has another length than the response")
            absent = table[name].null_count
            may_lack = {0, len(table)} if name in NULL_COLUMNS else {0}
            if absent not in may_lack and name not in NULL_ROWS:
                raise Violation(RULE, f"{path}: {name} is missing in {absent} of {len(table)} rollouts")
        ours, theirs = (
            _flat(side, name) for side, name in ((table, "policy_version"), (step.table, "policy_versions"))
        )
        if not np.array_equal(ours, theirs):
            raise Violation(RULE, f"{path}: policy_version is not that of the journal")
        ours, theirs = _flat(table, "rollout_logprobs"), _flat(step.table, "rollout_logprobs")
        if not np.allclose(ours, theirs, rtol=ROUNDING, atol=0):
            raise Violation(RULE, f"{path}: rollout_logprobs are not those of the journal")
        self.files += 1
        self.tokens += len(ours)

    def finish(self, num_steps: int) -> None:
        """Raises Violation for a file that does not agree with its batch, or is of a step that does not exist."""
        if self._fault is not None:
            raise self._fault
        if surplus := sorted(step for step in self._paths if step >= num_steps):
            raise Violation(RULE, f"{self._paths[surplus[0]]} is of no step: the journal has {num_steps}")


def check_same_credit(written: Path, replayed: Path) -> None:
    """Raises Violation unless a file of the run, if there is one, has the values of its replay."""
    if not written.exists():
        return
    found, expected = (pq.read_table(path) for path in (written, replayed))
    for name in CREDIT_SCHEMA.names:
        if not found[name].equals(expected[name]):
            raise Violation("replay", f"{written}: {name} is not what the journal leads to")


def _read(path: Path, step: Step) -> pa.Table:
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"ratchet"])
        named = about["schema"], about["step"], about["journal"]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise Violation(RULE, f"{path} cannot be read ({type(error).__name__}: {error}); remove it") from None
    if named != (SCHEMA_VERSION, step.number, step.digest) or not table.schema.equals(CREDIT_SCHEMA):
        raise Violation(RULE, f"{path} does not belong to this journal; it is set aside when the run continues")
    return table


def _flat(table: pa.Table, column: str) -> np.ndarray:
    return table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
