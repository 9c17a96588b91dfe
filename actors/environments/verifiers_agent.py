"""An agent that plays tasks of the package verifiers. Runs in each environment replica, and in a process of its own
for the check before a run.

The package's own rollout asks the model at the endpoint of the episode, and the package's rewards are the score. Each
episode has an environment object of the package for itself, so nothing of one episode stays for another.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.data.verifiers_prompts import FIELD
from common.environment import Endpoint, EpisodePrompt
from common.errors import UserError
from common.optional_packages import require
from common.user_code.errors import error_text

_numbers = itertools.count()


class VerifiersAgent:
    """Plays the tasks of one taskset."""

    def __init__(self, taskset: str, *, max_turns: int) -> None:
        """`max_turns`: the package ends a rollout after this many, and scores it. Raises UserError for a taskset that
        cannot be used."""
        where = f"environment.verifiers ({taskset})"
        require("verifiers", "verifiers", where)
        import verifiers.v1 as vf

        self._vf, self._taskset = vf, taskset
        try:
            kind = vf.env_config_type(taskset)
            if not issubclass(kind, vf.SingleAgentEnvConfig):
                raise UserError(
                    f"{where} is an environment of several agents; write an agent that plays it (environment.agent)"
                )
            harness = vf.default_harness_id(taskset)
            harness = "null" if harness == "bash" else harness  # bash would run the model's commands on this machine
            seat = {"runtime": {"type": "subprocess"}, "harness": {"id": harness}, "max_turns": max_turns}
            self._config = vf.resolve_env_config({"taskset": {"id": taskset}, "agent": seat})
            runs_code = vf.load_harness(self._config.agent.harness).EXECUTES_CODE
            self._task_type = type(vf.load_environment(self._config).taskset).task_type()
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"{where} cannot be used: {error_text(error)}") from error
        if runs_code:
            raise UserError(
                f"{where}: its harness ({harness}) runs what the model writes, which must not happen on this machine "
                "unasked; write an agent that plays it in a container (environment.agent)"
            )

    async def play(self, prompt: EpisodePrompt, endpoint: Endpoint) -> dict[str, Any]:
        """The score of a rollout, with the package's rewards and metrics. Raises RuntimeError if the rollout failed."""
        task = prompt.fields.get(FIELD)
        if not isinstance(task, dict) or task.get("taskset") != self._taskset:
            raise RuntimeError(f'the prompt has no task of {self._taskset}; set prompts.train = "verifiers:..."')
        data = self._task_type.data_type().model_validate(task["task"])
        env = self._vf.load_environment(self._config)
        with _variable(endpoint.api_key) as name:
            client = self._vf.EvalClientConfig(base_url=endpoint.base_url, api_key_var=name)
            context = self._vf.ModelContext(model=endpoint.model, client=client)
            async with env.serving():
                episode = await env.run_episode(self._task_type(data, self._config.taskset.task), context)
        for error in [*(error for trace in episode.traces for error in trace.errors), *episode.errors]:
            raise RuntimeError(f"the rollout of verifiers failed: {error.type}: {error.message}")
        [trace] = episode.traces
        rewards = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        return {"score": trace.reward, "info": {"rewards": rewards, "metrics": metrics}}


def check_taskset(taskset: str) -> None:
    """Raises UserError for a taskset that cannot be used."""
    VerifiersAgent(taskset, max_turns=1)


@contextmanager
def _variable(key: str) -> Iterator[str]:
    """The name of an environment variable that has this key meanwhile: the package reads keys only there. It hides
    variables with API_KEY in their names from the programs that it starts."""
    name = f"RATCHET_EPISODE_API_KEY_{next(_numbers)}"
    os.environ[name] = key
    try:
        yield name
    finally:
        del os.environ[name]
