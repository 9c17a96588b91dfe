"""The rollouts of journals as one sequence of rows: which steps are read, access in any order, held-out prompts.

Runs in the driver. Tokens stay in the journals' files, which are mapped, not loaded: journals may be larger than
memory. In memory each rollout takes 24 bytes.
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
from learner.ppo.scores import RunningMoments

# The columns of EXPERIENCE_SCHEMA that training reads, and the row's number among all rollouts.
COLUMNS = ["epoch", "prompt_index", "prompt_ids", "response_ids", "rollout_logprobs", "ref_logprobs", "score"]
ROW = "row"
_OPEN_FILES = 256  # mapped at once: a process may open about 1,000
_SHOWN = 12  # hex digits of a digest in messages


@dataclass(frozen=True)
class JournalPart:
    """The steps of one run's journal that are learned from."""

    run: str  # directory, absolute
    first: int
    end: int  # one after the last step
    void: tuple[int, ...]  # the steps in between that are skipped, because nobody could learn from them
    digest: str  # SHA-256 of the last step's file, which contains that of every entry before it

    @property
    def steps(self) -> list[int]:
        return [step for step in range(self.first, self.end) if step not in self.void]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> JournalPart:
        run, first, end, void, digest = (record[field.name] for field in fields(cls))
        return cls(run, first, end, tuple(void), digest)


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
    return JournalPart(os.path.abspath(run), first, end, void, journal.digest(end))


def shown_steps(chosen: slice) -> str:
    """The steps as the command line has them."""
    return f"{'' if chosen.start is None else chosen.start}:{'' if chosen.stop is None else chosen.stop}"


class Rollouts:
    """All rollouts of the parts, in the order of the parts and of their journals."""

    def __init__(
        self, parts: Sequence[JournalPart], *, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Reads every step once, and checks it against its journal. Raises UserError for a journal that has changed
        since the part was made, and for rollouts that nobody can learn from. `on_progress` gets the steps that are
        read, and all."""
        total = sum(len(part.steps) for part in parts)
        self.parts = parts
        self.moments = RunningMoments()  # of all scores
        self._files: list[Path] = []
        places: list[np.ndarray] = []  # of each file: the number of the file, and of the row in it
        tokens, prompts, belongs = [], [], []
        for number, part in enumerate(parts):
            journal = Journal(Path(part.run) / "journal")
            if journal.next_step < part.end or journal.digest(part.end) != part.digest:
                raise UserError(
                    f"the journal of {part.run} has changed since this training began: step {part.end - 1} had SHA-256 "
                    f"{part.digest[:_SHOWN]}; restore it, or begin again with --force"
                )
            for step in part.steps:
                path, table = journal.directory / f"step-{step:06d}.arrow", journal.read(step).table
                _check(table, path)
                self.moments.update(torch.tensor(table["score"].to_numpy()))
                rows = np.arange(table.num_rows, dtype=np.int32)
                places.append(np.stack([np.full_like(rows, len(self._files)), rows]))
                tokens.append(_lengths(table, "response_ids"))
                prompts.append(np.array([_hash(text) for text in table["prompt"].to_pylist()], dtype=np.int64))
                belongs.append(np.full_like(rows, number))
                self._files.append(path)
                on_progress(len(self._files), total)
        self._counts = np.bincount(np.concatenate(belongs), minlength=len(parts)).tolist()  # rollouts of each part
        self._places = np.concatenate(places, axis=1)
        self.response_tokens = np.concatenate(tokens)  # int64 [N]
        self._prompts = np.concatenate(prompts)  # int64 [N], equal for the same text
        self._open = lru_cache(_OPEN_FILES)(_mapped)

    def __len__(self) -> int:
        return self._places.shape[1]

    def records(self) -> list[dict[str, Any]]:
        """The parts and the number of their rollouts, for `critic.json` and RUN/journals.json."""
        return [{**asdict(part), "rollouts": count} for part, count in zip(self.parts, self._counts, strict=True)]

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
        held = order[: min(max(1, round(heldout_share * len(prompts))), len(prompts) - 1)]
        is_heldout = np.isin(which, held)
        return np.flatnonzero(~is_heldout), np.flatnonzero(is_heldout)


def _check(table: pa.Table, path: Path) -> None:
    """Raises UserError if a number is missing or not finite."""
    for name in ("score", "rollout_logprobs", "ref_logprobs"):
        column = table[name].combine_chunks()
        numbers = column if name == "score" else column.flatten()
        if (name == "score" and column.null_count) or not np.isfinite(numbers.to_numpy(zero_copy_only=False)).all():
            raise UserError(
                f"{path} has a {name} that is missing or not finite, and nobody can learn from it; leave its step out "
                "with --steps"
            )
    if not _lengths(table, "prompt_ids").all():
        raise UserError(f"{path} has a prompt without tokens; leave its step out with --steps")


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    return np.array([len(ids) for ids in table[name]], dtype=np.int64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _mapped(path: Path) -> pa.Table:
    """The columns of a step's file. Their bytes stay on disk until they are read."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().select(COLUMNS).replace_schema_metadata(None)
