"""Settings of environments, which answer the model in episodes of several turns. Runs anywhere."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from common.config.base import MAY_CHANGE, MayChange, Placed, Pooled, Positive, Seconds

KINDS = ("function", "tools", "agent", "verifiers")  # a section has exactly one of these settings


class EnvironmentConfig(Pooled):
    """The environment, and the processes that its episodes run in. Left out: each rollout is one turn."""

    function: str | None = None
    """`module:Class` of an environment. docs/environments.md explains it."""
    tools: tuple[str, ...] = ()
    """Python functions, each as `module:function`, that the model may call. Names, parameters and docstrings become the
    description that the model's chat template shows it."""
    agent: str | None = None
    """`module:function` of an agent: `async def agent(prompt, endpoint) -> float`. It asks the model at an
    OpenAI-compatible endpoint of its own episode, and returns a score."""
    verifiers: str | None = None
    """Taskset of the package verifiers (0.4): its rollouts ask the model as an agent does, and its rewards are the
    score. prompts.train must be "verifiers:TASKSET", with the same name. docs/environments.md explains it."""
    tool_parser: str = "hermes"
    """Name of the vLLM parser that finds tool calls in the model's text, with `tools` or in an agent's requests. vLLM's
    documentation names the parser of each model family; hermes reads
    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, which Qwen writes too."""
    max_turns: Positive = 8
    """Most turns of the model in an episode. An episode that reaches it has finish reason `max_turns`."""
    max_tokens: Positive = 1024
    """Most tokens of an episode after its prompt, those of the environment included. If there is no room for another
    turn, the episode ends with finish reason `max_tokens`. sampling.max_new_tokens bounds each turn."""
    sequence: Literal["episode", "turn"] = "episode"
    """What the learner reads as one sequence. `episode`: the whole conversation, to which each turn adds tokens.
    `turn`: each turn is a separate sequence, whose prompt is the whole conversation so far, as the chat template
    renders it. Use it if the template changes earlier messages. max_tokens counts the tokens of these prompts too.
    """
    step_timeout_s: MayChange[Seconds] = 60
    """Longest call of an environment's method, seconds. A longer call voids the episode."""
    concurrent: MayChange[Positive] = 64
    """Most episodes at once in each process. Further episodes wait in the driver."""

    @property
    def in_flight(self) -> int:
        """Requests sent to each process at once: an episode is one."""
        return self.concurrent

    @property
    def code(self) -> tuple[str, ...]:
        """The class, the agent, or the tools."""
        return tuple(name for name in (self.function, self.agent) if name) or self.tools

    @property
    def endpoint_kind(self) -> str | None:
        """`agent` or `verifiers`, if user code asks the model at an endpoint; otherwise None."""
        return next((kind for kind in ("agent", "verifiers") if getattr(self, kind)), None)

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings that decide what an episode is, as values of JSON."""
        may_change = {key for key, field in type(self).model_fields.items() if MAY_CHANGE in field.metadata}
        return self.model_dump(mode="json", exclude={*may_change, *Placed.model_fields})

    @property
    def name(self) -> str:
        """The name of the class, the agent, the taskset or the tools, for messages."""
        return self.verifiers or ", ".join(self.code)

    @model_validator(mode="after")
    def check_kind(self) -> EnvironmentConfig:
        """An environment is of exactly one kind."""
        given = [kind for kind in KINDS if getattr(self, kind)]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(KINDS[:-1])} and {KINDS[-1]} must be set, not "
                f"{' and '.join(given) or 'none of them'}; name a class, an agent, a taskset or some "
                "tools, or leave the section out"
            )
        return self

    @model_validator(mode="after")
    def check_limits(self) -> EnvironmentConfig:
        """A step must end before the call that waits for it times out."""
        if self.step_timeout_s >= 0.9 * self.timeout_s:
            raise ValueError(
                f"step_timeout_s ({self.step_timeout_s:g}) must be below 0.9 * timeout_s ({0.9 * self.timeout_s:g}), "
                "after which the run stops; lower the first or raise the second"
            )
        return self
