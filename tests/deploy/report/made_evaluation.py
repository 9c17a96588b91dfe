"""A directory as `ratchet evaluate` leaves it: two policies, eight answers each, prompts and answers as given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_json
from common.types import SampleId, Score, Void
from deploy.evaluation.answers import AnswerFile, write_prompts
from deploy.evaluation.policies import EvaluationPlan
from deploy.evaluation.record import evaluation_record
from deploy.run.directory import run_owner
from learner.evaluation.asking import questions
from learner.loop.answers import Answered
from tests.fakes import make_prompt, make_rollout, tiny_config

CHANCES = {"base": 0.3, "mine": 0.6}  # of an answer that passes


def write_evaluation(directory: Path, *, prompts: int, texts: Sequence[str], samples: int = 8) -> dict[str, Any]:
    """The prompts and the answers say the texts. Returns the contents of evaluation.json."""
    cfg = tiny_config("model")
    plan = EvaluationPlan(dict.fromkeys(CHANCES, "model"), samples)
    with run_owner(directory) as owned:
        owned.begin(cfg, "evaluate", force=False)
    said = [f"{number} {texts[number % len(texts)]}" for number in range(prompts)]
    made = [
        replace(make_prompt(number), sample_id=SampleId(-1, number, 0), text=text) for number, text in enumerate(said)
    ]
    plan.write(directory, {})
    write_prompts(directory, made)
    draws = np.random.default_rng(0)
    answers = {}
    for name, chance in CHANCES.items():
        file = AnswerFile(directory, name, made, lambda responses: [texts[ids[0] % len(texts)] for ids in responses])
        file.append([_answer(prompt, draws.random() < chance) for prompt in questions(made, samples, set())])
        answers[name] = list(file.read(samples).values())
    record = evaluation_record(cfg, plan, answers, prompts)
    write_json(directory / "evaluation.json", record)
    return record


def _answer(prompt: Any, passed: bool) -> Answered:
    _, number, sample = prompt.sample_id
    rollout = make_rollout(prompt, [4 + number, 5 + sample, 1])
    void = (number, sample) == (1, 0)
    score = Void(prompt.sample_id, "no service") if void else Score(float(passed), {"exact": float(passed)})
    return Answered(rollout, score, rollout.rollout_logprobs - np.float32(0.25))
