"""Every rollout that the prompt stream issued: trained once, void, or outstanding. Runs in `ratchet audit`.

The ids are derived again here, from the seed and the number of prompts, without learner/loop/prompts.py. Ids have
numbers in the order in which they were first issued. With N prompts and R rollouts of each, number n is rollout n mod R
of the prompt at place (n // R) mod N in the order of epoch n // (R N).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from learner.proof.chain import Step, Violation

RULE = "samples"


class Samples:
    """Follows the ids through the batches."""

    def __init__(self, *, seed: int, num_prompts: int, rollouts_per_prompt: int) -> None:
        self._seed, self._num_prompts, self._replicas = seed, num_prompts, rollouts_per_prompt
        self._issued = 0
        self._outstanding: set[int] = set()  # numbers
        self._order = (-1, np.empty(0, dtype=np.int64))  # of one epoch
        self.in_batches: dict[int, int] = {}  # rollouts by step
        self.num_void = self.asked_again = 0

    @property
    def issued(self) -> int:
        return self._issued

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding)

    def take(self, step: Step) -> None:
        """Checks that the batch and its voids have exactly the ids that are no longer outstanding. Raises Violation."""
        issued, outstanding = self._state(step)
        pending = self._outstanding | set(range(self._issued, issued))
        if back := outstanding - pending:
            raise Violation(RULE, f"step {step.number}: {self.id(min(back))} was settled before, and is outstanding")
        again = {self.id(number) for number in outstanding}
        rows, voids = step.sample_ids, [sample_id for sample_id, *_ in step.about["voids"]]
        gone = [sample_id for sample_id in voids if sample_id not in again]
        self._compare(step.number, rows, gone, expected={self.id(number) for number in pending - outstanding})
        if unexplained := [void for void in step.about["voids"] if not void[1]]:
            raise Violation(RULE, f"step {step.number}: {unexplained[0][0]} is void without a reason")
        self._issued, self._outstanding = issued, outstanding
        self.in_batches[step.number] = len(rows)
        self.num_void += len(gone)
        self.asked_again += len(voids) - len(gone)

    def id(self, number: int) -> str:
        """The sample id with this number."""
        position, replica = divmod(number, self._replicas)
        epoch, place = divmod(position, self._num_prompts)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(self._num_prompts))
        return f"{epoch}/{self._order[1][place]}/{replica}"

    def _state(self, step: Step) -> tuple[int, set[int]]:
        """How many ids were issued by the end of this batch, and the numbers of those outstanding."""
        state = step.about["prompts"]
        issued, ranges = state["issued"], [tuple(part) for part in state["outstanding"]]
        ends = [0, *(end for part in ranges for end in part), issued]
        if issued < self._issued or ends != sorted(ends) or any(first >= end for first, end in ranges):
            raise Violation(RULE, f"step {step.number}: its prompt stream ({state}) does not follow the one before")
        return issued, {number for first, end in ranges for number in range(first, end)}

    @staticmethod
    def _compare(step: int, rows: Iterable[str], voids: Iterable[str], *, expected: set[str]) -> None:
        settled = Counter([*rows, *voids])
        if twice := [sample_id for sample_id, times in settled.items() if times > 1]:
            raise Violation(RULE, f"step {step}: {twice[0]} is settled {settled[twice[0]]} times")
        if lost := sorted(expected - settled.keys()):
            raise Violation(RULE, f"step {step}: {lost[0]} is lost: neither in the batch nor void nor outstanding")
        if surplus := sorted(settled.keys() - expected):
            raise Violation(
                RULE, f"step {step}: {surplus[0]} was not outstanding: it was never issued, or trained before"
            )
