"""Which object plays an episode, by the kind of environment. Runs in each environment replica."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.environments.agents import AgentEnvironment
from actors.environments.endpoint import EndpointServer
from actors.environments.loading import find_agent, find_environment
from actors.environments.rendering import TOOL_ANSWERS, check_conversations, check_template
from actors.environments.tool_formats import CallReader, ToolFormats, Tools
from actors.environments.tools import ToolEnvironment
from common.config.actors import SamplingConfig
from common.config.environment import EnvironmentConfig
from common.errors import UserError
from common.user_code.errors import UserCodeError
from common.user_code.functions import explain_import
from common.user_code.tools import load_tools

Make = Callable[[], Any]  # makes the object of one episode: anything with the methods of common/environment.py


@dataclass(frozen=True)
class Kind:
    """What an environment's episodes are played with."""

    make: Make
    template_options: Mapping[str, Any] = field(default_factory=dict)  # arguments of the chat template
    close: Callable[[], None] = lambda: None  # frees what its episodes share


def episode_kind(cfg: EnvironmentConfig, tokenizer: PreTrainedTokenizerBase, sampling: SamplingConfig) -> Kind:
    """Raises UserError for a class, an agent or a tool that cannot be used, and for a parser that does not fit the
    tokenizer. `sampling`: of the run."""
    if cfg.agent is not None:
        try:
            return agent_kind(find_agent(cfg.agent), cfg, tokenizer, sampling)
        except UserCodeError as error:
            raise UserError(explain_import(cfg.agent, "environment.agent", error)) from None
    if cfg.function is not None:
        try:
            return Kind(find_environment(cfg.function))
        except UserCodeError as error:
            raise UserError(explain_import(cfg.function, "environment.function", error)) from None
    if cfg.verifiers is not None:
        from actors.environments.verifiers_agent import VerifiersAgent

        return agent_kind(VerifiersAgent(cfg.verifiers, max_turns=cfg.max_turns).play, cfg, tokenizer, sampling)
    # It imports vLLM, which only environments with tools need.
    from actors.environments.vllm_tool_calls import ToolCallReader

    tools = load_tools(cfg.tools)
    schemas = [tool.schema for tool in tools]
    reader = ToolCallReader(cfg.tool_parser, tokenizer, schemas)
    return Kind(partial(ToolEnvironment, tools, reader.read), {"tools": schemas})


def agent_kind(
    agent: Callable[..., Any], cfg: EnvironmentConfig, tokenizer: PreTrainedTokenizerBase, sampling: SamplingConfig
) -> Kind:
    """Starts the server that this agent asks in every episode."""

    def reader(tools: Tools) -> CallReader:
        # It imports vLLM, which only agents with tools need.
        from actors.environments.vllm_tool_calls import ToolCallReader

        schemas = [dict(tool) for tool in tools]
        check = check_template if cfg.sequence == "episode" else check_conversations
        check(tokenizer, "the policy", TOOL_ANSWERS, calls=True, plain=False, tools=schemas)
        return ToolCallReader(cfg.tool_parser, tokenizer, schemas)

    server = EndpointServer(sampling)
    make = partial(AgentEnvironment, agent, server, ToolFormats(tokenizer, reader), cfg)
    return Kind(make, close=server.close)
