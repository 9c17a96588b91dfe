"""Learner ranks as processes of this machine, without Ray. Runs in `ratchet replay`, `ratchet audit --replay` and
`ratchet evaluate --variance`.

The number of ranks is part of the device layout: it decides the order in which gradients are added. So a run of several
ranks is replayed by as many.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from common.errors import RoleError, UserError
from common.files import write_whole
from learner.proof.chain import Violation

Work = Callable[[int, int, str], None]  # (rank, world, rendezvous)


def write_progress(progress: Path, work: str, done: int, total: int) -> None:
    """Writes how much of some work is done, for the progress bar of another process."""
    write_whole(progress, f"{work}\n{done}\n{total}")


def read_progress(progress: Path) -> tuple[str, int, int]:
    """What `write_progress` wrote. Raises OSError or ValueError before that."""
    work, done, total = progress.read_text(encoding="utf-8").splitlines()
    return work, int(done), int(total)


def in_ranks(work: Work, world: int, *, gpus: float, scratch: Path) -> None:
    """Does the work in every rank, and returns when all have. A single rank works in this process.

    Raises the first error of a rank after killing all others, which may wait for that rank forever.
    """
    if world == 1:
        work(0, 1, "")
        return
    context = multiprocessing.get_context("spawn")  # a fork would share the threads' locks
    rendezvous = f"file://{scratch / 'rendezvous'}"
    processes, pipes = [], []
    try:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (work, rank, world, rendezvous, gpus > 0, theirs)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            pipes.append(ours)
            processes[-1].start()
            theirs.close()  # else the pipe would stay open when the process ends
        running = dict(zip(pipes, range(world)))
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                rank = running.pop(pipe)
                _raise_failure(pipe, rank)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _raise_failure(pipe: Connection, rank: int) -> None:
    """Reads how a rank ended. Raises its error."""
    try:
        error = pipe.recv()
    except EOFError:
        raise RoleError(f"rank {rank} ended without an error message; it may have run out of memory") from None
    if isinstance(error, (Violation, UserError)):
        raise error
    if error is not None:
        raise RoleError(f"rank {rank} failed:\n{error}")


def _rank(work: Work, rank: int, world: int, rendezvous: str, on_gpu: bool, pipe: Connection) -> None:
    """Runs in each rank. Sends None, or the error."""
    try:
        if on_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = _device(rank, os.environ.get("CUDA_VISIBLE_DEVICES"))
        work(rank, world, rendezvous)
        pipe.send(None)
    except (Violation, UserError) as error:
        pipe.send(error)
    except Exception:  # the parent shows the traceback; a rank that ends silently would hide it
        pipe.send(traceback.format_exc())


def _device(rank: int, visible: str | None) -> str:
    """The GPU of a rank, among those that CUDA_VISIBLE_DEVICES names. Raises UserError if they are too few."""
    names = visible.split(",") if visible else None
    if names is not None and rank >= len(names):
        raise UserError(
            f"the run has a rank {rank}, but CUDA_VISIBLE_DEVICES ({visible}) names only {len(names)} GPU(s); name one "
            "for each rank"
        )
    return str(rank) if names is None else names[rank]
