"""Checks an environment before anything starts. Runs in the driver.

A process of its own imports the class or the tools, so nothing of the user's module stays in the driver.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.environments.rendering import TOOL_ANSWERS, check_conversations, check_template
from common.config.environment import EnvironmentConfig
from common.errors import UserError
from common.plain_text import one_line
from common.user_code.errors import UserCodeError
from common.user_code.functions import explain_import
from common.user_code.packages import package_root

IMPORT_S = 120.0  # time limit of the import, seconds
# Arguments of the script: the class, the agent, or tools with commas between them; the new sys.path as JSON; and a file
# for the result. Ratchet's packages are found first, as in the replicas.
_SCRIPT = """
import json, sys
from common.user_code.packages import import_ratchet_first
import_ratchet_first()
functions, path, result = sys.argv[1:]
sys.argv = [""]
sys.path[:] = json.loads(path)
{imports}
from common.errors import UserError
from common.user_code.errors import UserCodeError
found = {{}}
try:
    {look}
except UserCodeError as error:
    found["fault"] = vars(error)
except UserError as error:
    found["refusal"] = str(error)
with open(result, "w") as file:
    json.dump(found, file)
"""
_CLASS = _SCRIPT.format(
    imports="from actors.environments.loading import find_environment", look="find_environment(functions)"
)
_AGENT = _SCRIPT.format(imports="from actors.environments.loading import find_agent", look="find_agent(functions)")
_VERIFIERS = _SCRIPT.format(
    imports="from actors.environments.verifiers_agent import check_taskset", look="check_taskset(functions)"
)
_TOOLS = _SCRIPT.format(
    imports="from common.user_code.tools import load_tools",
    look='found["schemas"] = [tool.schema for tool in load_tools(functions.split(","))]',
)


def check_environment(
    cfg: EnvironmentConfig, tokenizer: PreTrainedTokenizerBase, *, model: str, chat: bool
) -> list[dict[str, Any]]:
    """Returns the schemas of the tools, for the chat template. Raises UserError if the class cannot be imported or is
    no environment, if a function cannot be an agent or a tool, or if the template cannot continue a conversation.
    `model`: the policy's name. `chat`: prompts.format is "chat"."""
    check = check_template if cfg.sequence == "episode" else check_conversations
    if cfg.function is not None:
        check_class(cfg.function)
        if chat:
            check(tokenizer, model)
        return []
    if cfg.endpoint_kind:
        if cfg.agent is not None:
            check_agent(cfg.agent)
        if cfg.verifiers is not None:
            check_verifiers(cfg.verifiers)
        check(tokenizer, model, plain=False)
        return []
    schemas = tool_schemas(cfg.tools)
    check(tokenizer, model, TOOL_ANSWERS, plain=False, tools=schemas)
    return schemas


def check_class(function: str) -> None:
    """Raises UserError unless `module:Class` can be imported and has the methods of an environment."""
    _check(_CLASS, function, "environment.function")


def check_agent(function: str) -> None:
    """Raises UserError unless `module:function` can be imported and takes a prompt and an endpoint."""
    _check(_AGENT, function, "environment.agent")


def check_verifiers(taskset: str) -> None:
    """Raises UserError unless the package verifiers has this taskset and its rollouts can be played."""
    found = _found_by(_VERIFIERS, taskset, f"environment.verifiers ({taskset})")
    if "refusal" in found:
        raise UserError(found["refusal"])


def _check(script: str, function: str, setting: str) -> None:
    found = _found_by(script, function, f"{setting} ({function})")
    if fault := found.get("fault"):
        raise UserError(explain_import(function, setting, UserCodeError(**fault)))


def tool_schemas(tools: Sequence[str]) -> list[dict[str, Any]]:
    """The description of each tool, for the chat template. Raises UserError for a function that cannot be a tool."""
    functions = ",".join(tools)
    found = _found_by(_TOOLS, functions, f"environment.tools ({functions})")
    if "refusal" in found:
        raise UserError(found["refusal"])
    return list(found["schemas"])


def _found_by(script: str, functions: str, what: str) -> dict[str, Any]:
    """The result that the script writes in a process of its own. Raises UserError if it writes none."""
    with TemporaryDirectory() as directory:
        result = Path(directory, "result.json")
        path = json.dumps([package_root(), *sys.path])
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", script, functions, path, str(result)],
                env={**os.environ, "PYTHONPATH": package_root()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=IMPORT_S,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"{what} took longer than {IMPORT_S:g} s to import") from None
        if not result.exists():
            printed = done.stdout[-10_000:].decode(errors="replace").strip().splitlines()
            last = f" (the last line it printed: {one_line(printed[-1], 200)})" if printed else ""
            raise UserError(
                f"{what} ended its process, with exit code {done.returncode}, while its module was imported{last}"
            )
        return dict(json.loads(result.read_text()))
