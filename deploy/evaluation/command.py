"""`ratchet evaluate`: answers of policies to held-out prompts, scored by the sources and judges of a PPO config.

Runs in the driver. The reward and reference services serve all policies. Only one policy has engines at a time: they
stop before those of the next policy start, which need the memory. After the last answer each policy is measured on
texts, in a reference service of its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.pool.roles import ReferencePool, RewardPool
from common.config.ppo import Config
from common.errors import UserError
from common.files import write_json
from common.types import Prompt, SampleId, Score, Void
from deploy.ending import signals
from deploy.evaluation.answers import AnswerFile, write_prompts
from deploy.evaluation.perplexity import TextMeasurement
from deploy.evaluation.plots import write_plots
from deploy.evaluation.policies import EvaluationPlan, check_identity, check_room, identity_of, load_policies
from deploy.evaluation.record import evaluation_record
from deploy.evaluation.texts import load_texts
from deploy.evaluation.truncation import truncation_warnings
from deploy.plan.needs import Phases, generator_needs, reference_needs, service_needs
from deploy.policy_files import PolicyFiles
from deploy.run.directory import RunDirectory, run_owner
from deploy.run.error_files import ErrorFiles
from deploy.run.summary import write_answers
from deploy.screen.evaluation_progress import EvaluationProgress
from deploy.session import load_inputs, session
from deploy.starting import Starter
from learner.evaluation.asking import BATCH, ask_all, questions
from learner.loop.answers import Answered, answer
from learner.loop.evaluation import check_voids
from learner.loop.judges import JudgeWatch, has_all_scores
from learner.loop.prompts import heldout_prompts


def run_evaluation(
    cfg: Config,
    directory: Path,
    *,
    policies: Mapping[str, str] | None = None,
    samples: int | None = None,
    resume: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Evaluates the base (model.path) and `policies`, paths by name, with `samples` answers to each prompt. One policy
    with one answer is evaluated alone. Writes evaluation.json and the answers into `directory`, and returns the record
    of evaluation.json. With `resume` it continues, with more policies and more samples if they are given.

    Everything a user can get wrong is checked first: a UserError leaves nothing written and nothing running."""
    if cfg.prompts.heldout is None or not cfg.evaluation.prompts:
        raise UserError("there are no prompts to evaluate on; set both prompts.heldout and evaluation.prompts")
    with run_owner(directory, resume=resume, force=force) as owned:
        if resume:
            plan = EvaluationPlan.read(directory).extended(cfg, policies or {}, samples)
        else:
            plan = EvaluationPlan.of(cfg, policies or {}, samples or 1)
        return _run_in(owned, cfg, plan, resume=resume, force=force)


def _run_in(owned: RunDirectory, cfg: Config, plan: EvaluationPlan, *, resume: bool, force: bool) -> dict[str, Any]:
    directory = owned.directory
    reference, policies = load_policies(cfg, plan)
    first = next(iter(policies.values()))
    heldout = {"prompts.heldout": cfg.prompts.heldout}
    inputs = load_inputs(cfg, first, cfg.reward, heldout, judges=cfg.evaluation.judges)
    [records] = inputs.records
    check_room(policies, records, cfg.max_response_tokens, setting=cfg.max_response_setting)
    identity = identity_of(cfg, reference, policies, records)
    if resume:
        check_identity(directory, identity)
    for text in truncation_warnings(cfg.sampling, plan.samples):
        owned.log.warn(text)
    prompts = heldout_prompts(records, cfg.evaluation.prompts)
    progress = EvaluationProgress(directory, owned.log, plan, len(prompts))
    texts = TextMeasurement(cfg, directory, load_texts(cfg, list(policies.values())))
    files = {name: AnswerFile(directory, name, prompts, policy.decode) for name, policy in policies.items()}
    judges = JudgeWatch(progress.warn)
    evaluation = _Evaluation(cfg, directory, plan, policies, files, prompts, texts, progress, judges)

    def phases(cfg: Config) -> Phases:
        services = service_needs(cfg, reference.size, inputs.reward_models)
        services = [need for need in services if need.section != "generators"]
        tokens = cfg.max_sequence_tokens
        sizes = [policy.size for policy in policies.values()]
        answering = [[*generator_needs(cfg.generators, size, max_tokens=tokens), *services] for size in sizes]
        return [*answering, *([need] for size in sizes for need in reference_needs(cfg, size))]

    def record() -> None:
        plan.write(directory, identity)
        write_prompts(directory, prompts)

    left = evaluation.missing() if resume else None
    if left is not None and not left and not texts.missing(policies):
        record()
        owned.resume(cfg)
    else:
        with session(cfg, "evaluate", owned, phases, resume=resume, force=force, record=record) as (_, begin):
            begin()
            first.keep_tokenizer(directory)
            with progress.bars:
                signals.run(evaluation.run(evaluation.missing() if left is None else left))
    return evaluation.finish()


@dataclass(frozen=True)
class _Evaluation:
    """An evaluation in its run directory."""

    cfg: Config
    directory: Path
    plan: EvaluationPlan
    policies: Mapping[str, PolicyFiles]
    files: Mapping[str, AnswerFile]  # of each policy, written or not
    prompts: Sequence[Prompt]
    texts: TextMeasurement
    progress: EvaluationProgress
    judges: JudgeWatch

    def answers(self, name: str) -> dict[SampleId, Answered]:
        """The answers of a policy so far."""
        return self.files[name].read(self.plan.samples)

    def missing(self) -> dict[str, list[Prompt]]:
        """The questions that each policy has not answered. A question is asked again if its answer has no score, or no
        score from a judge. Policies that have answered all questions are left out."""
        found = {}
        for name in self.policies:
            known = {of for of, answer in self.answers(name).items() if has_all_scores(answer.score)}
            if left := questions(self.prompts, self.plan.samples, known):
                found[name] = left
        return found

    async def run(self, missing: Mapping[str, Sequence[Prompt]]) -> None:
        """Lets every policy answer its missing questions, and then measures the perplexity of those that lack it."""
        self.progress.begin({name: len(left) for name, left in missing.items()})
        if missing:
            await self._ask(missing)
        for name in self.texts.missing(self.policies):
            with self._starter() as start:
                await self.texts.measure(name, self.policies[name], start, self.progress.reading(name))

    async def _ask(self, missing: Mapping[str, Sequence[Prompt]]) -> None:
        cfg = self.cfg
        any_policy = next(iter(self.policies.values()))
        with self._starter() as start:
            rewards, references = await asyncio.gather(
                start.rewards(cfg.reward, policy=any_policy, judges=cfg.evaluation.judges), start.references(cfg)
            )
            reward, reference = RewardPool(rewards, ErrorFiles(self.directory).keep), ReferencePool(references)
            for name, left in missing.items():
                with self._starter() as engines:
                    await self._ask_policy(name, left, engines, reward, reference)

    @contextmanager
    def _starter(self) -> Iterator[Starter]:
        """Starts pools, and ends them at the end of the block, also after an error."""
        start = Starter(self.cfg.ray, on_event=self.progress.pool, tell=self.progress.note)
        try:
            yield start
        finally:
            start.stop()

    async def _ask_policy(
        self, name: str, left: Sequence[Prompt], engines: Starter, reward: RewardPool, reference: ReferencePool
    ) -> None:
        cfg, file, progress = self.cfg, self.files[name], self.progress
        errors = ErrorFiles(self.directory)
        generators = await engines.writers(self.policies[name], cfg, keep=errors.keep, seed=cfg.seed)
        progress.ready(name)
        total, scores = len(self.prompts) * self.plan.samples, list[Score | Void]()
        is_new = len(left) == total

        async def ask(prompt: Prompt) -> Answered:
            found = await answer(prompt, generators, reward.judge, reference)
            progress.answered(name, found)
            self.judges.see(found.score)
            return found

        def keep(answers: Sequence[Answered]) -> None:
            file.append(answers)
            scores.extend(answer.score for answer in answers)
            if is_new:  # the rest of a continued evaluation may be only questions that never get a score
                _check_beginning(name, scores, cfg.reward.max_void_share)
            check_voids(scores, total, cfg.reward.max_void_share)

        at_once = 2 * cfg.generators.max_replicas * cfg.generators.in_flight
        await ask_all(left, ask, keep, at_once=at_once)
        progress.finished(name)

    def finish(self) -> dict[str, Any]:
        """Writes the figures, from the answers on disk, and shows them."""
        answers = {name: list(self.answers(name).values()) for name in self.policies}
        of_texts = {name: self.texts.figures(name, self.plan.base) for name in self.policies}
        record = evaluation_record(self.cfg, self.plan, answers, len(self.prompts), of_texts)
        files = ["evaluation.json"]
        if self.plan.is_single:
            [(name, found)] = answers.items()
            judged = [(rollout, score) for rollout, score, _ in found]
            write_answers(self.directory / "answers.jsonl", judged, self.policies[name].tokenizer)
            files.append("answers.jsonl")
        else:
            files += [plot.name for plot in write_plots(record, self.directory)]
        write_json(self.directory / "evaluation.json", record)
        self.progress.end(record, [*files, *([] if self.plan.is_single else ["answers/"])])
        return record


def _check_beginning(name: str, scores: Sequence[Score | Void], max_void_share: float) -> None:
    """Raises UserError if none of a policy's first answers has a score, so that a dead service costs only one batch."""
    first = [score.reason for score in scores[:BATCH] if isinstance(score, Void)]
    if len(first) == BATCH and max_void_share < 1:
        raise UserError(
            f"none of the first {BATCH} answers of {name} could be scored; most often: "
            f"{Counter(first).most_common(1)[0][0]}; fix it and continue with --resume, or set reward.max_void_share=1"
        )
