"""The prompt stream: training prompts in an order that depends only on the seed, resumable. Runs in the driver.

Every sample id has a number, in the order in which ids are first issued. With two records, two rollouts per prompt and
an order of epoch 0 that begins with record 1:

    number      0      1      2      3      4      5   ...
    sample id   0/1/0  0/1/1  0/0/0  0/0/1  1/.../0 1/.../1

If 0 to 4 are issued, and 0, 2 and 3 are in the journal, the state is {"issued": 5, "outstanding": [[1, 2], [4, 5]]}:
half-open ranges of numbers. A resumed run asks 1 and 4 again, and continues with 5.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from common.types import HELDOUT_EPOCH, PROBE_EPOCH, Prompt, PromptRecord, SampleId


class PromptStream:
    """Issues prompts epoch after epoch, each epoch in its own seeded order, and knows which are outstanding.

    A sample id is outstanding from `next` until `settle`. A restored stream first issues the outstanding ones again, in
    their old order. `give_back` makes `next` issue some of them again.
    """

    def __init__(self, records: Sequence[PromptRecord], *, seed: int, rollouts_per_prompt: int) -> None:
        self._records = records
        self._seed = seed
        self._replicas = rollouts_per_prompt
        self._issued = 0  # ids issued so far, which is also the next number
        self._outstanding: dict[SampleId, int] = {}  # with their numbers, in order of number
        self._settled_below = 0  # all numbers below are settled
        self._settled: set[int] = set()  # settled numbers above that
        self._reissue: deque[SampleId] = deque()
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))  # (epoch, permutation)
        self._hash = hashlib.sha256("\0".join(record.text for record in records).encode()).hexdigest()

    @property
    def num_prompts(self) -> int:
        """Number of training prompts. Together with the seed, it decides the order of the prompts."""
        return len(self._records)

    @property
    def outstanding(self) -> list[SampleId]:
        """The outstanding ids, in the order of their numbers."""
        return list(self._outstanding)

    def next(self) -> Prompt:
        """The next prompt: one that was given back or restored, if there is any."""
        if self._reissue:
            return self._prompt(self._reissue.popleft())
        sample_id = self._id(self._issued)
        self._outstanding[sample_id] = self._issued
        self._issued += 1
        return self._prompt(sample_id)

    def probes(self, count: int) -> list[Prompt]:
        """The first `count` prompts, under ids that `next` never issues. They do not change the stream."""
        ids = [SampleId(PROBE_EPOCH, index, 0) for index in range(min(count, len(self._records)))]
        return [self._prompt(sample_id) for sample_id in ids]

    def settle(self, sample_ids: Iterable[SampleId]) -> None:
        """Marks ids as settled: the journal's next step has them, as rollouts or as voids that are not asked again."""
        for sample_id in sample_ids:
            self._settled.add(self._outstanding.pop(sample_id))
        while self._settled_below in self._settled:
            self._settled.remove(self._settled_below)
            self._settled_below += 1

    def give_back(self, sample_ids: Sequence[SampleId]) -> None:
        """Issues these ids again before any other, in this order. They stay outstanding."""
        self._reissue.extendleft(reversed(sample_ids))

    def state(self) -> dict[str, Any]:
        """A small record for `restore`. `outstanding` is a list of half-open ranges of numbers, so its size depends on
        the gaps among them and not on how many are outstanding."""
        ends = [*sorted(self._settled), self._issued]
        firsts = [self._settled_below, *(number + 1 for number in ends[:-1])]
        return {
            "prompts_hash": self._hash,
            "issued": self._issued,
            "outstanding": [[first, end] for first, end in zip(firsts, ends, strict=True) if first < end],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Raises UserError if the state belongs to other prompts: a sample id would then name another text."""
        if state["prompts_hash"] != self._hash:
            raise UserError(
                f"the {len(self._records)} prompts of prompts.train are not those the run began with; "
                "restore them, or start a new run"
            )
        self._issued = state["issued"]
        numbers = [number for first, end in state["outstanding"] for number in range(first, end)]
        self._outstanding = {self._id(number): number for number in numbers}
        self._reissue = deque(self._outstanding)
        self._settled_below = numbers[0] if numbers else self._issued
        self._settled = set(range(self._settled_below, self._issued)) - set(numbers)

    def _id(self, number: int) -> SampleId:
        position, replica = divmod(number, self._replicas)
        epoch, place = divmod(position, len(self._records))
        return SampleId(epoch, int(self._permutation(epoch)[place]), replica)

    def _prompt(self, sample_id: SampleId) -> Prompt:
        record = self._records[sample_id.prompt]
        return Prompt(sample_id, record.text, record.token_ids, record.fields, record.messages)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._records)))
        return self._order[1]


def heldout_prompts(records: Sequence[PromptRecord], count: int) -> list[Prompt]:
    """The first `count` held-out records, as prompts that no training stream can issue."""
    return [
        Prompt(SampleId(HELDOUT_EPOCH, index, 0), record.text, record.token_ids, record.fields, record.messages)
        for index, record in enumerate(records[:count])
    ]
