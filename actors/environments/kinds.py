"""Which object plays an episode, by the kind of environment. Runs in each environment replica."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.environments.loading import find_environment
from actors.environments.tools import ToolEnvironment
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


def episode_kind(cfg: EnvironmentConfig, tokenizer: PreTrainedTokenizerBase) -> Kind:
    """Raises UserError for a class or a tool that cannot be used, and for a parser that does not fit the tokenizer."""
    if cfg.function is not None:
        try:
            return Kind(find_environment(cfg.function))
        except UserCodeError as error:
            raise UserError(explain_import(cfg.function, "environment.function", error)) from None
    # It imports vLLM, which only environments with tools need.
    from actors.environments.vllm_tool_calls import ToolCallReader

    tools = load_tools(cfg.tools)
    schemas = [tool.schema for tool in tools]
    reader = ToolCallReader(cfg.tool_parser, tokenizer, schemas)
    return Kind(partial(ToolEnvironment, tools, reader.read), {"tools": schemas})
