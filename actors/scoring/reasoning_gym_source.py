"""The rule of a reasoning-gym task as a reward source. Runs in each reward replica, and in the driver for the checks
before a run.

The field `reasoning_gym` of a prompt's record has the task, its parameters, and whether its rule runs answers as Python
code. The fields `question`, `answer` and `metadata` are the entry. common/data/reasoning_gym_prompts.py writes these
fields. Some rules run parts of their entry as Python code. So prompts from any other source are refused
(broken_reasoning_gym_rules in common/config/sources.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.metadata import version

from actors.scoring.function_check import try_function
from actors.scoring.function_source import FunctionSource
from common.config.actors import SourcesConfig
from common.config.sources import FunctionSourceConfig, ReasoningGymSourceConfig
from common.errors import UserError
from common.optional_packages import require
from common.reasoning_gym_rule import refusal
from common.reward_input import RewardInput
from common.types import RawScore
from common.user_code.errors import UserCodeError

_ENTRY = ("question", "answer", "metadata")


class ReasoningGymSource:
    """Calls the rule as a reward function, with the same limits. The origin of a score is the task and the version of
    the package."""

    def __init__(self, cfg: ReasoningGymSourceConfig, service: SourcesConfig) -> None:
        self._cfg = cfg
        self._function = FunctionSource(_function(cfg), service)
        self._version = version("reasoning-gym")

    async def __call__(self, answer: RewardInput) -> RawScore:
        """The task's score. Raises UserCodeError."""
        if (fault := _fault(answer)) is not None:
            raise UserCodeError(fault)
        scored = await self._function(_input(self._cfg, answer))
        task = answer.fields["reasoning_gym"]["task"]
        return RawScore(scored.score, f"reasoning-gym {self._version}: {task}")

    def close(self) -> None:
        """Ends its threads or worker processes."""
        self._function.close()


def _function(cfg: ReasoningGymSourceConfig) -> FunctionSourceConfig:
    return FunctionSourceConfig(name=cfg.name, function="actors.scoring.reasoning_gym_score:score")


def _fault(answer: RewardInput) -> str | None:
    """Why this source cannot score any response to the prompt; None if it can."""
    if lacking := [key for key in ("reasoning_gym", *_ENTRY) if key not in answer.fields]:
        return (
            f"needs all fields of a reasoning-gym prompt, but the record lacks {', '.join(lacking)}; leave out "
            "prompts.columns.prompt"
        )
    return None


def _input(cfg: ReasoningGymSourceConfig, answer: RewardInput) -> RewardInput:
    """The argument of the function that scores."""
    rule = answer.fields["reasoning_gym"]
    fields = {
        "task": rule["task"],
        "parameters": rule["parameters"],
        "pattern": cfg.answer_pattern,
        "run_answers": cfg.run_answers,
        "entry": {key: answer.fields[key] for key in _ENTRY},
    }
    return replace(answer, fields=fields)


# Before a run


def check_package(cfg: ReasoningGymSourceConfig, chat: bool) -> None:
    """Raises UserError if the package is not installed."""
    require("reasoning_gym", "reasoning-gym", f"reward source {cfg.name}")


def try_rule(cfg: ReasoningGymSourceConfig, service: SourcesConfig, answer: RewardInput) -> str:
    """Raises UserError if the first prompt lacks fields, or if its task would run responses as code without permission.
    Returns a warning if the rule fails on the made-up response, else ""."""
    fault = _fault(answer)
    if fault is None and answer.fields["reasoning_gym"]["runs_answers"] and not cfg.run_answers:
        fault = refusal(answer.fields["reasoning_gym"]["task"])
    if fault is not None:
        raise UserError(f"reward source {cfg.name} {fault}")
    return try_function(_function(cfg), service, _input(cfg, answer))


def rule_digest(cfg: ReasoningGymSourceConfig) -> str:
    """SHA-256 of the package's version. The task and its parameters are in the prompts, which have a digest too."""
    return hashlib.sha256(f"reasoning-gym {version('reasoning-gym')}".encode()).hexdigest()
