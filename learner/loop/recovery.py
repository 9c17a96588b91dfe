"""Brings a resumed run to where it stopped, from its newest checkpoint and its journal. Runs in the driver."""

from __future__ import annotations

from functools import partial

from common.files import append_record, read_records
from learner.loop.batch_metrics import batch_metrics
from learner.loop.journal import JournalError
from learner.loop.run import Run


async def recover(run: Run) -> None:
    """Brings the learner to the end of the journal, and the generators to the learner's weights.

    The journal is the log and a checkpoint is only a cache of it. Steps after the newest checkpoint are learned again
    from the journal, without generating anything. A new run has neither and starts from the initial weights.
    """
    if (checkpoint := run.checkpoints.newest()) is not None:
        await run.learner.restore(checkpoint)
    if run.learner.step > run.journal.next_step:
        raise JournalError(
            f"{checkpoint} holds {run.learner.step} steps, but the journal only {run.journal.next_step}: its newest "
            "files were lost; restore them, or remove that checkpoint to continue from the journal alone"
        )
    metrics = run.directory / "metrics.jsonl"
    logged = {record["step"] for record in read_records(metrics)}
    for entry in run.journal.since(run.learner.step):
        run.doing = partial("step {} is learned again from the journal".format, entry.step + 1)
        stats = await run.learner.update(entry.table)
        if entry.step not in logged:
            rollouts = batch_metrics(entry.table, len(entry.voids), policy_version=entry.policy_version)
            append_record(metrics, {"step": entry.step, "time": entry.time, **rollouts, **stats})
    if (last := run.journal.last()) is not None:
        run.prompts.restore(last.prompts)
    # A new run loads its initial weights too: if engines cannot take new weights, it fails before anything is learned.
    await run.generators.load(run.learner.publish(), run.learner.step)
