"""RUN/summary.json and RUN/answers of a PPO run. Runs in the driver."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.config.ppo import Config
from common.files import read_records
from common.turns import messages_of
from common.types import Rollout, Score, Void
from learner.loop.answers import score_record
from learner.loop.evaluation import Evaluation, win_rate
from learner.ppo.critic_quality import POSITIONS

STEPS = 5  # one step's figures of a critic are noisy: summary.json has the means of this many


def summarise(cfg: Config, directory: Path, evaluations: Sequence[Evaluation], *, seconds: float) -> dict[str, Any]:
    """The contents of summary.json: how well the critic predicts, if there is one; the evaluation before training and
    the last one; pass@1 if both have one. Without an evaluation of version 0 (its record was lost, or evaluations began
    later) nothing is called "before"."""
    summary: dict[str, Any] = {"seed": cfg.seed, "num_steps": cfg.num_steps, "seconds": round(seconds, 1)}
    if cfg.ppo.has_critic:
        summary |= _critic(read_records(directory / "metrics.jsonl"))
    if not evaluations:
        return summary
    before, after = evaluations[0], evaluations[-1]
    if before.policy_version > 0:
        return summary | {"score_after": after.score, "heldout_prompts": after.prompts, "after": after.record()}
    if before.pass_at_1 is not None and after.pass_at_1 is not None:
        summary |= {
            "pass_at_1_before": before.pass_at_1,
            "pass_at_1_before_interval": before.interval,
            "pass_at_1_after": after.pass_at_1,
            "pass_at_1_after_interval": after.interval,
        }
    return summary | {
        "score_before": before.score,
        "score_after": after.score,
        "win_rate": _win_rate(directory, before, after),
        "heldout_prompts": after.prompts,
        "before": before.record(),
        "after": after.record(),
    }


def answers_path(directory: Path, evaluation: Evaluation) -> Path:
    """The file with the answers of an evaluation."""
    return directory / f"answers/version-{evaluation.policy_version:06d}.jsonl"


def write_answers(
    path: Path, answers: Sequence[tuple[Rollout, Score | Void]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Held-out answers with their scores, one JSON record a line; a void has its reason instead of a score. An episode
    also has its turns: what the policy wrote, what the environment answered, its reward and info."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for rollout, score in answers:
            record: dict[str, Any] = {
                "prompt": rollout.prompt.text,
                "response": tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True),
                "finish_reason": rollout.finish_reason,
                **score_record(score),
            }
            if rollout.turns:
                record["turns"] = _turns(rollout, tokenizer)
            file.write(json.dumps(record) + "\n")


def _turns(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The turns of an episode. If it was cut off before the environment answered the last turn, that has no answer."""
    found = []
    for start, end, turn in messages_of(rollout.turns, len(rollout.response_ids)):
        answer = (
            {}
            if turn is None
            else {"observation": json.loads(turn.observation), "reward": turn.reward, "info": json.loads(turn.info)}
        )
        text = tokenizer.decode(rollout.response_ids[start:end].tolist(), skip_special_tokens=True)
        found.append({"text": text, **answer})
    return found


def _critic(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Explained variance in the last steps, and the variance of the realised returns in the first and last steps. A
    critic that explains much of a tiny variance explains nothing, so the three must be read together. Empty if no step
    has these figures."""

    def mean(key: str, steps: Sequence[dict[str, Any]]) -> float:
        return fmean(step[key] for step in steps)

    steps = [record for record in records if "value/returns_var/realised" in record]
    if not steps:
        return {}
    first, last, explained = steps[:STEPS], steps[-STEPS:], "value/explained_variance"
    return {
        "explained_variance": mean(explained, last),
        "explained_variance_realised": mean(f"{explained}/realised", last),
        "explained_variance_by_position": {where: mean(f"{explained}/{where}", last) for where in POSITIONS},
        "returns_var_start": mean("value/returns_var/realised", first),
        "returns_var_end": mean("value/returns_var/realised", last),
    }


def _win_rate(directory: Path, before: Evaluation, after: Evaluation) -> float | None:
    """None if there was only one evaluation, or if answers are missing."""
    scores = [
        [record.get("score") for record in read_records(answers_path(directory, evaluation))]
        for evaluation in (before, after)
    ]
    if before.policy_version == after.policy_version or not len(scores[0]) == len(scores[1]) == after.prompts:
        return None
    return win_rate(*scores)
