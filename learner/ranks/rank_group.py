"""The ranks of a trainer, one Ray actor per device, behind one object: the calls that every kind of trainer has.

Runs in the driver. (Only `_rendezvous` is sent to the first rank, and runs there.)
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from torch.distributed import DistError

from common.config.training import TrainerConfig
from common.daemon_threads import answer, in_daemon_thread
from common.errors import BatchError, RoleError, UserError
from common.precedence import Precedence
from learner.ranks.processes import Processes, awaited

# After one rank has failed, the time in which the others may still report their own errors, seconds.
_LATE_ERRORS_S = 10.0


class RankGroup:
    """The calls that every kind of group has. All ranks take part in each, because they gather and reduce together.

    Only one call runs at once. The others wait here: in the ranks' own queues, their time limit would already run.
    After a rank is lost, every call raises a RankLostError.
    """

    role = "Learner"  # the name of each rank in messages

    def __init__(
        self,
        create: Callable[[int], Any],
        cfg: TrainerConfig,
        *,
        startup_timeout_s: float,
        report: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
        tell: Callable[[str], None] | None = None,
        precedence: Precedence | None = None,
    ) -> None:
        """`create` starts the process of one rank and returns its handle. The process answers health probes in a
        concurrency group of Ray, "health". `report` gets warnings for the user, and `tell` which ranks wait for a node;
        without `tell`, `report` gets both. Extra replicas of pools with this `precedence` make room for the ranks."""
        self._processes = Processes(
            self.role, create, cfg, startup_timeout_s, report, tell or report, precedence or Precedence()
        )
        self._timeout_s, self._startup_timeout_s = cfg.timeout_s, startup_timeout_s
        self._turn = asyncio.Lock()
        self._step = 0
        self._rendezvous = ""  # address where several ranks meet

    @property
    def step(self) -> int:
        return self._step

    async def start(self) -> None:
        """Starts the ranks, as many as the cluster has room for. Returns when each has loaded its networks and met the
        others."""
        await self._processes.start()
        ranks, limit = self._processes.handles, self._startup_timeout_s
        if len(ranks) > 1:
            found = {0: ranks[0].__ray_call__.remote(_rendezvous)}
            [self._rendezvous] = await self._wait("start", found, timeout_s=limit)
        joined = {rank: handle.join.remote(rank, len(ranks), self._rendezvous) for rank, handle in enumerate(ranks)}
        await self._wait("start", joined, timeout_s=limit)

    def stop(self) -> None:
        """Kills every rank, which frees its resources."""
        self._processes.stop()
        self._forget_rendezvous()

    def _forget_rendezvous(self) -> None:
        if self._rendezvous.startswith("file://"):
            shutil.rmtree(Path(self._rendezvous.removeprefix("file://")).parent, ignore_errors=True)
        self._rendezvous = ""

    async def update(self, batch: Any) -> dict[str, float]:
        shared = await self._share(batch)
        stats = await self._call("update", lambda rank: rank.update.remote(shared))
        self._step += 1
        return stats[0]

    async def save(self, directory: Path) -> dict[str, str]:
        files = await self._call("save a checkpoint", lambda rank: rank.save.remote(directory.resolve()))
        return {name: digest for part in files for name, digest in part.items()}

    async def restore(self, directory: Path) -> None:
        steps = await self._call("restore a checkpoint", lambda rank: rank.restore.remote(directory.resolve()))
        self._step = steps[0]

    async def _share(self, batch: Any) -> Any:
        """A reference to one copy of the batch for all ranks."""
        try:
            return await answer(in_daemon_thread(ray.put, batch), within_s=self._timeout_s)
        except TimeoutError as error:
            raise RoleError(
                f"Ray's object store did not take the batch of step {self._step} within {self._timeout_s:g} s "
                "(learner.timeout_s); the node's raylet does not answer; continue with --resume"
            ) from error

    async def _call(self, what: str, call: Callable[[Any], Any]) -> list[Any]:
        """The answer of every rank to a call, when its turn has come."""
        async with self._turn:
            self._processes.check()
            with self._processes.during(f"{what} at step {self._step}"):
                return await self._wait(what, dict(enumerate(map(call, self._processes.handles))))

    async def _wait(self, what: str, calls: Mapping[int, Any], *, timeout_s: float | None = None) -> list[Any]:
        """The answers of all `calls`, given by rank.

        When one rank fails, ranks that wait for it lose their connection and may report that first. So if there are
        several errors, this raises the one that caused the others.
        """
        limit = timeout_s or self._timeout_s
        tasks = {rank: awaited(call) for rank, call in calls.items()}
        waiting = asyncio.wait(tasks.values(), timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        done, _ = await self._processes.unless_lost(waiting)
        if (failures := [error for task in done if (error := task.exception())]) and not any(map(_is_death, failures)):
            waiting = asyncio.wait(tasks.values(), timeout=min(limit, _LATE_ERRORS_S))
            done, _ = await self._processes.unless_lost(waiting)
        unfinished = [rank for rank, task in tasks.items() if task not in done]
        errors = {rank: error for rank, task in tasks.items() if task in done and (error := task.exception())}
        if errors:
            error = self._role_error(what, *min(errors.items(), key=lambda item: _distance_from_cause(item[1])))
            if unfinished:  # they may wait for the failed rank, and would take no other call
                self._processes.lose(f"{self._names(unfinished)} did not end the step that failed in another rank")
            raise error
        if unfinished:
            raise self._timed_out(what, limit, unfinished)
        return [task.result() for task in tasks.values()]

    def _role_error(self, what: str, rank: int, error: BaseException) -> BaseException:
        """The error to raise when a rank failed: it names the rank, unless the user has to fix something."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, (UserError, BatchError)):
            return error.cause  # without the trace of another process
        at = f"{what} at step {self._step}"
        if isinstance(error, RayActorError):
            return self._processes.died(rank, at, error)
        if len(self._processes.handles) > 1:
            if _is_consequence(error):
                return self._processes.lose(f'{self._names([rank])} lost another rank during "{at}"', error)
            error.add_note(f"rank {rank} of {len(self._processes.handles)} did not {at}")
        return error

    def _timed_out(self, what: str, limit_s: float, ranks: Sequence[int]) -> BaseException:
        setting = "ray.startup_timeout_s" if what == "start" else "learner.timeout_s"
        return self._processes.lose(
            f"{self._names(ranks)} did not {what} at step {self._step} within {limit_s:g} s ({setting}); find out what "
            "blocks it, or raise the limit, and continue with --resume"
        )

    def _names(self, ranks: Sequence[int]) -> str:
        return ", ".join(map(self._processes.name, ranks))


def _is_death(error: BaseException) -> bool:
    return isinstance(error, RayActorError)


def _distance_from_cause(error: BaseException) -> int:
    """0 for a death, 1 for an error of the rank itself, 2 for a lost connection, which another rank's error causes."""
    return 0 if _is_death(error) else 2 if _is_consequence(error) else 1


def _is_consequence(error: BaseException) -> bool:
    """True for the error of a rank that only lost its connection to another one."""
    if not isinstance(error, RayTaskError):
        return False  # the process itself is gone
    text = str(error.cause)
    return isinstance(error.cause, DistError) or any(sign in text for sign in ("gloo", "Connection", "NCCL"))


def _rendezvous(first: Any) -> str:
    """The address where the ranks meet. Called in the first rank's process."""
    return first.open_rendezvous(ray.util.get_node_ip_address())
