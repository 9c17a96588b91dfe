"""When held-out evaluations are due, and what follows from them. Runs in the driver."""

from __future__ import annotations

import time
from functools import partial

from common.files import append_record
from common.health.health import names
from common.types import Score, Void
from learner.loop.checkpoints import save_now
from learner.loop.evaluation import Evaluation, best_version, evaluate
from learner.loop.recovery import with_learner, without_learner
from learner.loop.run import Run


async def evaluate_if_due(run: Run, evaluations: list[Evaluation]) -> None:
    """Adds an evaluation of the policy that the generators hold, if the config asks for one here and none was made."""
    step, every = run.learner.step, run.cfg.evaluation.every
    wanted = step in (0, run.cfg.num_steps) or (every > 0 and step % every == 0)
    if not (run.heldout and wanted) or any(done.policy_version == step for done in evaluations):
        return

    def show(done: int) -> None:
        run.doing = lambda: f"version {step} of the policy has answered {done} of {len(run.heldout)} held-out prompts"
        run.on_answer(done, len(run.heldout))

    def answered(done: int, score: Score | Void) -> None:
        run.judges.see(score)
        show(done)

    show(0)
    evaluating = evaluate(
        run.heldout,
        run.generators,
        run.reward,
        run.reference if step else None,  # version 0 is the reference
        run.cfg.evaluation,
        policy_version=step,
        max_void_share=run.cfg.reward.max_void_share,
        answered=answered,
    )
    evaluation, answers = await without_learner(run, evaluating)
    # The hash ties the record to the steps that this version has learned from.
    record = {"time": time.time(), "journal": run.journal.digest(step), **evaluation.record()}
    events = run.health.evaluation(record)
    run.on_evaluation(evaluation, answers, events)  # saves the answers first: a recorded evaluation is not repeated
    append_record(run.directory / "evaluations.jsonl", {**record, **names(events)})
    evaluations.append(evaluation)
    if run.cfg.checkpoint.best and best_version(evaluations) == step:
        run.checkpoints.best = step
        await with_learner(run, partial(save_now, run.learner, run.checkpoints))
