"""Checks every batch: its rows are complete, and no token is older than the run allows. Runs in `ratchet audit`."""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.experience_table import EXPERIENCE_SCHEMA, response_masks
from learner.proof.chain import Step, Violation

PER_TOKEN = ("rollout_logprobs", "policy_versions", "ref_logprobs")  # one value for each token that was sampled


class Batches:
    """Checks the rows of the batches, and the versions of the weights that sampled them."""

    def __init__(self, *, rollouts_per_step: int, max_staleness: int, learns: bool = True) -> None:
        """Without `learns`, version 0 of the weights wrote every token, and is its own reference."""
        self._size, self._max_staleness, self._learns = rollouts_per_step, max_staleness, learns
        self.rollouts: dict[int, int] = {}  # by step
        self.tokens: dict[int, int] = {}
        self.oldest = 0  # most versions between a token's weights and the learner's
        self._not_finite: dict[int, str] = {}  # by step, the column

    def take(self, step: Step) -> None:
        """Raises Violation."""
        self._check_rows(step)
        versions, now = _flat(step.table, "policy_versions"), step.about["policy_version"]
        if now != (expected := step.number if self._learns else 0):
            raise Violation("versions", f"step {step.number} says that the learner had version {now}, not {expected}")
        if len(versions):
            if versions.max() > now:
                raise Violation(
                    "versions", f"step {step.number} has a token of version {versions.max()}, newer than {now}"
                )
            age = int(now - versions.min())
            if age > self._max_staleness:
                raise Violation(
                    "versions",
                    f"step {step.number} has a token {age} versions old; max_staleness is {self._max_staleness}",
                )
            self.oldest = max(self.oldest, age)
        self.rollouts[step.number], self.tokens[step.number] = step.table.num_rows, len(versions)

    def finish(self, voided: Container[int]) -> None:
        """Raises Violation for a number that is not finite, unless nothing was learned from its batch."""
        for step, column in self._not_finite.items():
            if step not in voided:
                raise Violation("batches", f"step {step}: {column} has a number that is not finite")

    def _check_rows(self, step: Step) -> None:
        table, name = step.table, f"step {step.number}"
        if not table.schema.equals(EXPERIENCE_SCHEMA):
            raise Violation("batches", f"{name} does not have the columns of a batch")
        if not 0 < table.num_rows <= self._size or set(table["step"].to_pylist()) != {step.number}:
            found = f"{table.num_rows} rows of steps {set(table['step'].to_pylist())}"
            raise Violation("batches", f"{name} must have 1 to {self._size} rows, all of this step; it has {found}")
        _check_turns(table, name)
        lengths = np.array([mask.sum() for mask in response_masks(table)])
        for column in PER_TOKEN:
            known = ~table[column].is_null().to_numpy()
            if not np.array_equal(_lengths(table, column)[known], lengths[known]):
                raise Violation("batches", f"{name}: {column} has another length than the response")
            if not np.isfinite(_flat(table, column)).all():
                self._not_finite[step.number] = column
        unmeasured = table["ref_logprobs"].null_count
        if self._learns and step.number and unmeasured:
            raise Violation("batches", f"{name} has rollouts without ref_logprobs; only those of step 0 need none")
        if not self._learns and unmeasured < table.num_rows:
            raise Violation("batches", f"{name} has ref_logprobs, but its policy never learned and needs none")
        if not np.isfinite(table["score"].to_numpy()).all():
            self._not_finite[step.number] = "score"


def _check_turns(table: pa.Table, name: str) -> None:
    """Raises Violation unless the turns of each response follow one another inside it."""
    for row, (ids, turns) in enumerate(zip(table["response_ids"], table["turns"].to_pylist(), strict=True)):
        places = [0, *(turn[key] for turn in turns or () for key in ("end", "next_start")), len(ids)]
        if places != sorted(places):
            raise Violation("batches", f"{name}: the turns of row {row} do not follow one another in its response")
        if not np.isfinite([turn["reward"] for turn in turns or ()]).all():
            raise Violation("batches", f"{name}: row {row} has a reward that is not finite")
        for turn in turns or ():
            if turn["new_context"] and turn["end"] == turn["next_start"]:
                raise Violation("batches", f"{name}: row {row} has a new context without a prompt")
            if turn["ends"] and not turn["new_context"]:
                raise Violation("batches", f"{name}: row {row} has a sequence that ends where no other begins")


def _flat(table: pa.Table, column: str) -> np.ndarray:
    """The values of all lists in a column, one after the other."""
    return table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _lengths(table: pa.Table, column: str) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(table[column]), 0).to_numpy()
