"""The rollouts of journals as one sequence of rows: chooses the steps, reads rows in any order, holds out prompts.

Runs in the driver. Tokens stay in the journals' files, which are mapped, not loaded. So journals may be larger than
memory. Each rollout takes 24 bytes of memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from common.errors import UserError
from learner.loop.journal import Journal
from learner.loop.notes import identity, learns
from learner.ppo.scores import RunningMoments

# The columns of EXPERIENCE_SCHEMA that training reads, and the row's number among all rollouts.
COLUMNS = ["epoch", "prompt_index", "prompt_ids", "response_ids", "rollout_logprobs", "ref_logprobs", "score", "turns"]
ROW = "row"
_OPEN_FILES = 256  # mapped at once: a process may open about 1,000
_SHOWN = 12  # hex digits of a digest in messages


@dataclass(frozen=True)
class JournalPart:
    """The steps of one run's journal that are learned from."""

    run: str  # directory, absolute
    first: int
    end: int  # one after the last step
    void: tuple[int, ...]  # the steps in between that are skipped, because they have no usable rollouts
    digest: str  # SHA-256 of the last step's file, which contains that of every entry before it
    seed: int | None = None  # of its run
    prompts: str | None = None  # digest of its training prompts, in the order in which they were asked
    learns: bool = True  # False: the responses are those of --sample, which has seeds of its own

    @property
    def steps(self) -> list[int]:
        return [step for step in range(self.first, self.end) if step not in self.void]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> JournalPart:
        known = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        return cls(**{**known, "void": tuple(record["void"])})


def choose_steps(run: Path, chosen: slice) -> JournalPart:
    """The steps of a run's journal that are in `chosen`, half-open. Raises UserError if there are none."""
    journal = Journal(run / "journal")
    count, first = journal.next_step, chosen.start or 0
    end = count if chosen.stop is None else chosen.stop
    if count == 0:
        raise UserError(f"--from ({run}) has no journal with steps; name the directory of a run of ratchet train")
    if end > count or first >= end:
        raise UserError(
            f"--steps {shown_steps(chosen)} is not in the journal of {run}, which has {count} steps: 0:{count}"
        )
    void = tuple(sorted(step for step in journal.voided if first <= step < end))
    if len(void) == end - first:
        raise UserError(f"--from ({run}): every step of {first}:{end} is void in its journal; choose others")
    notes = journal.notes
    seed = next((note.fields["config"].get("seed") for note in notes if note.kind == "begin"), None)
    prompts = identity(notes, before_step=first).get("prompts.train")
    return JournalPart(os.path.abspath(run), first, end, void, journal.digest(end), seed, prompts, learns(notes))


def shown_steps(chosen: slice) -> str:
    """The steps as the command line has them."""
    return f"{'' if chosen.start is None else chosen.start}:{'' if chosen.stop is None else chosen.stop}"


class Rollouts:
    """All rollouts of the parts, in the order of the parts and of their journals."""

    def __init__(
        self, parts: Sequence[JournalPart], *, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Reads every step once, and checks it against its journal. Skips steps that `_fault` rejects, and lists them
        in `faults`. Raises UserError for a journal that has changed since the part was made. `on_progress` gets the
        number of steps read so far, and of all."""
        total = sum(len(part.steps) for part in parts)
        self.parts = parts
        self.moments = RunningMoments()  # of all scores
        self.faults: list[str] = []  # one sentence for each step that is skipped
        self.longest = 0  # tokens of the longest prompt with its response
        self._skipped: list[list[int]] = [[] for _ in parts]
        self._files: list[Path] = []
        places = [np.empty((2, 0), dtype=np.int32)]  # of each file, [2, n]: its number, and the rows in it
        tokens, prompts, part_numbers = ([np.empty(0, dtype=np.int64)] for _ in range(3))
        done = 0
        for number, part in enumerate(parts):
            journal = Journal(Path(part.run) / "journal")
            if journal.next_step < part.end or journal.digest(part.end) != part.digest:
                raise UserError(
                    f"the journal of {part.run} has changed since this training began: step {part.end - 1} had SHA-256 "
                    f"{part.digest[:_SHOWN]}; restore it, or begin again with --force"
                )
            for step in part.steps:
                path, table = journal.directory / f"step-{step:06d}.arrow", journal.read(step).table
                done += 1
                on_progress(done, total)
                if (fault := _fault(table)) is not None:
                    self.faults.append(f"{path} has {fault}")
                    self._skipped[number].append(step)
                    continue
                self.moments.update(torch.tensor(table["score"].to_numpy()))
                rows = np.arange(table.num_rows, dtype=np.int32)
                places.append(np.stack([np.full_like(rows, len(self._files)), rows]))
                tokens.append(_lengths(table, "rollout_logprobs"))
                whole = _lengths(table, "prompt_ids") + _lengths(table, "response_ids")
                self.longest = max(self.longest, *whole.tolist(), 0)
                prompts.append(np.array([_hash(text) for text in table["prompt"].to_pylist()], dtype=np.int64))
                part_numbers.append(np.full(table.num_rows, number))
                self._files.append(path)
        if parts and not self._files:
            raise UserError(f"none of the chosen steps can be learned from: {self.faults[0]}; choose others")
        self._counts = np.bincount(np.concatenate(part_numbers), minlength=len(parts)).tolist()  # rollouts of each part
        self._places = np.concatenate(places, axis=1)
        self.response_tokens = np.concatenate(tokens)  # int64 [N], those that a policy sampled
        self._prompts = np.concatenate(prompts)  # int64 [N], equal for the same text
        self._open = lru_cache(_OPEN_FILES)(_mapped)

    def __len__(self) -> int:
        return self._places.shape[1]

    def records(self) -> list[dict[str, Any]]:
        """The parts and the number of their rollouts, for `critic.json` and RUN/journals.json."""
        counts = zip(self.parts, self._skipped, self._counts, strict=True)
        return [{**asdict(part), "skipped": skipped, "rollouts": count} for part, skipped, count in counts]

    @property
    def num_prompts(self) -> int:
        return len(np.unique(self._prompts))

    def table(self, rows: np.ndarray) -> pa.Table:
        """The rollouts at `rows`, in that order: COLUMNS and ROW."""
        files, within = self._places[:, rows]
        parts, order = [], []
        for file in np.unique(files):
            here = np.flatnonzero(files == file)
            parts.append(self._open(self._files[file]).take(pa.array(within[here])))
            order.append(here)
        table = pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(order)))).combine_chunks()
        return table.append_column(ROW, pa.array(rows, pa.int64()))

    def chunks(self, rows: np.ndarray, size: int) -> Iterator[pa.Table]:
        """The tables of `rows`, with at most `size` in each."""
        for start in range(0, len(rows), size):
            yield self.table(rows[start : start + size])

    def split(self, heldout_share: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows to learn from and held-out rows. All responses to a prompt are on the same side. Raises UserError for
        fewer than two prompts."""
        prompts, which = np.unique(self._prompts, return_inverse=True)
        if not len(self):
            raise UserError("the journals have no rollout in the chosen steps; choose others (--from, --steps)")
        if len(prompts) < 2:
            raise UserError(
                f"the journals have {len(self)} responses to a single prompt, and the critic is judged on prompts that "
                "it has not learned from; add a run with other prompts (--from)"
            )
        order = np.random.default_rng([seed, 0]).permutation(len(prompts))
        held = order[: num_heldout(len(prompts), heldout_share)]
        is_heldout = np.isin(which, held)
        return np.flatnonzero(~is_heldout), np.flatnonzero(is_heldout)


def num_heldout(prompts: int, share: float) -> int:
    """Prompts that are held out: at least one, and not all."""
    return min(max(1, round(share * prompts)), prompts - 1)


def _fault(table: pa.Table) -> str | None:
    """The reason why a step cannot be learned from: a number that is missing or not finite, or an empty prompt."""
    for name in ("score", "rollout_logprobs", "ref_logprobs"):
        column = table[name].combine_chunks()
        numbers = column if name == "score" else column.flatten()
        if (name == "score" and column.null_count) or not np.isfinite(numbers.to_numpy(zero_copy_only=False)).all():
            return f"a {name} that is missing or not finite"
    return None if _lengths(table, "prompt_ids").all() else "a prompt without tokens"


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    return np.array([len(ids) for ids in table[name]], dtype=np.int64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _mapped(path: Path) -> pa.Table:
    """The columns of a step's file. Their bytes stay on disk until they are read."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().select(COLUMNS).replace_schema_metadata(None)
