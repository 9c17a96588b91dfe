"""`ratchet audit`: proves from a run directory that nothing was lost and nothing trained twice, without Ray and vLLM.

Runs in a process of its own. It writes nothing into the run directory and takes no lock. The directory may be a copy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from common.config.ppo import Config
from deploy.replay import config_for_replay, refuse_other_directories, refuse_unlearned, replay_in_ranks
from deploy.run.record import RECORD, read_record
from deploy.screen.console import Output, complain
from learner.loop.journal import Journal
from learner.proof.audit import Audit, Proved, audit
from learner.proof.chain import Violation

HOLDS, BROKEN = 0, 1  # exit codes


def run_audit(
    run: Path,
    *,
    replay: bool = False,
    model: str | None = None,
    critic: str | None = None,
    settings: Sequence[str] = (),
) -> int:
    """Prints a table with the results of all rules, or the first broken rule. Returns the exit code. With `replay` it
    also learns the whole journal again, and compares every checkpoint. The other arguments are those of `ratchet
    replay`."""
    refuse_other_directories(run)
    try:
        found = audit(run)
        if read_record(run).get("journal", found.digests[0]) != found.digests[0]:
            raise Violation("chain", f"{run}/journal is the journal of another run than {run}/{RECORD}")
        if replay:
            journal = Journal(run / "journal")
            refuse_unlearned(journal)
            found.proved.append(_replay(found, config_for_replay(run, journal, model, critic, settings)))
    except Violation as violation:
        complain(f"audit of {run} failed: {violation}")
        return BROKEN
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for heading in ("rule", "proved", "counts"):
        table.add_column(heading, overflow="fold")
    for line in found.proved:
        table.add_row(*line)
    Output().print(table)
    return HOLDS


def _replay(found: Audit, cfg: Config) -> Proved:
    """Learns every step again. Raises Violation at the first difference."""
    checkpoints = found.checkpoints.complete
    policy = _finished_policy(found)
    replay_in_ranks(
        cfg,
        found.run,
        found.num_steps,
        checkpoints=checkpoints,
        policy=policy,
        metrics=found.metrics,
        credit=range(found.num_steps),
    )
    compared = [f"checkpoint {step}" for step in checkpoints] + ([] if policy is None else ["policy/"])
    return Proved(
        "replay",
        "the journal alone gives the same weights, optimizer state, metrics and credit, bit for bit",
        f"{found.num_steps:,} steps; compared: {', '.join(compared) or 'only metrics'}",
    )


def _finished_policy(found: Audit) -> Path | None:
    """RUN/policy, if the run has ended at the journal's last step."""
    try:
        summary = json.loads((found.run / "summary.json").read_text(encoding="utf-8"))
        finished = summary["num_steps"] == found.num_steps
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found.run / "policy" if finished and (found.run / "policy/config.json").exists() else None
