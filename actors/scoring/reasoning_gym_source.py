"""The rule of a reasoning-gym task as a reward source. Runs in each reward replica, and in the driver for the checks
before a run.

The prompt's record says which task it is from: its field `reasoning_gym` has the task, its parameters, and whether its
rule runs answers as Python code. The fields `question`, `answer` and `metadata` are the entry.
common/data/reasoning_gym_prompts.py writes these fields.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from actors.scoring.function_check import try_function
from actors.scoring.function_source import FunctionSource
from common.config.actors import SourcesConfig
from common.config.sources import FunctionSourceConfig, ReasoningGymSourceConfig
from common.errors import UserError
from common.optional_packages import require
from common.reward_input import RewardInput
from common.types import RawScore
from common.user_code.errors import UserCodeError

_ENTRY = ("question", "answer", "metadata")
_RULE = ("task", "parameters", "runs_answers")


class ReasoningGymSource:
    """Calls the rule as a reward function, with the same limits. The origin of a score is the task and the version of
    the package."""

    def __init__(self, cfg: ReasoningGymSourceConfig, service: SourcesConfig) -> None:
        self._cfg = cfg
        self._function = FunctionSource(_function(cfg), service)
        self._version = version("reasoning-gym")

    async def __call__(self, answer: RewardInput) -> RawScore:
        """The task's score. Raises UserCodeError."""
        if (fault := _fault(self._cfg, answer)) is not None:
            raise UserCodeError(fault)
        scored = await self._function(_input(self._cfg, answer))
        task = answer.fields["reasoning_gym"]["task"]
        return RawScore(scored.score, f"reasoning-gym {self._version}: {task}")

    def close(self) -> None:
        """Ends its threads or worker processes."""
        self._function.close()


def _function(cfg: ReasoningGymSourceConfig) -> FunctionSourceConfig:
    return FunctionSourceConfig(name=cfg.name, function="actors.scoring.reasoning_gym_score:score")


def _fault(cfg: ReasoningGymSourceConfig, answer: RewardInput) -> str | None:
    """Why this source cannot score any response to the prompt; None if it can."""
    rule: Any = answer.fields.get("reasoning_gym")
    if not isinstance(rule, dict) or not (rule.keys() >= {*_RULE} and answer.fields.keys() >= {*_ENTRY}):
        return (
            "scores prompts of reasoning-gym only, but the prompt's record has not their fields (reasoning_gym, "
            'question, answer, metadata); set prompts.train = "reasoning-gym:TASK"'
        )
    if rule["runs_answers"] and not cfg.run_answers:
        return (
            f"would run responses as Python code, because the rule of the task {rule['task']} does; allow it with "
            "run_answers = true, or choose another task"
        )
    return None


def _input(cfg: ReasoningGymSourceConfig, answer: RewardInput) -> RewardInput:
    """The argument of the function that scores."""
    rule = answer.fields["reasoning_gym"]
    fields = {
        "task": rule["task"],
        "parameters": rule["parameters"],
        "pattern": cfg.answer_pattern,
        "entry": {key: answer.fields[key] for key in _ENTRY},
    }
    return replace(answer, fields=fields)


# Before a run


def check_package(cfg: ReasoningGymSourceConfig, chat: bool) -> None:
    """Raises UserError if the package is not installed."""
    require("reasoning_gym", "reasoning-gym", f"reward source {cfg.name}")


def try_rule(cfg: ReasoningGymSourceConfig, service: SourcesConfig, answer: RewardInput) -> str:
    """Raises UserError if the first prompt is not of reasoning-gym, or if its task would run responses as code without
    permission. Returns a warning if the rule fails on the made-up response, else ""."""
    if (fault := _fault(cfg, answer)) is not None:
        raise UserError(f"reward source {cfg.name} {fault}")
    if answer.fields["reasoning_gym"]["runs_answers"] and service.isolation == "thread":
        raise UserError(
            f"reward source {cfg.name} runs responses as Python code (run_answers), so that a single one can stop the "
            'reward process; set reward.isolation = "process" (labeller.isolation for a labeller)'
        )
    return try_function(_function(cfg), service, _input(cfg, answer))


def rule_digest(cfg: ReasoningGymSourceConfig) -> str:
    """SHA-256 of the package's version. The task and its parameters are in the prompts, which have a digest too."""
    return hashlib.sha256(f"reasoning-gym {version('reasoning-gym')}".encode()).hexdigest()
