"""Checks an environment before anything starts. Runs in the driver.

A process of its own imports the class, so nothing of the user's module stays in the driver.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from actors.environments.rendering import check_template
from common.config.environment import EnvironmentConfig
from common.errors import UserError
from common.plain_text import one_line
from common.user_code.errors import UserCodeError
from common.user_code.functions import explain_import
from common.user_code.packages import package_root

IMPORT_S = 120.0  # time limit of the import, seconds
# Its arguments: the class, the new sys.path as JSON, and a file for the fault. Ratchet's packages are found first, as
# in the replicas.
_SCRIPT = """
import json, sys
from common.user_code.packages import import_ratchet_first
import_ratchet_first()
function, path, result = sys.argv[1:]
sys.argv = [""]
sys.path[:] = json.loads(path)
from actors.environments.loading import find_environment
from common.user_code.errors import UserCodeError
try:
    find_environment(function)
    fault = None
except UserCodeError as error:
    fault = vars(error)
with open(result, "w") as file:
    json.dump(fault, file)
"""


def check_environment(cfg: EnvironmentConfig, tokenizer: PreTrainedTokenizerBase, *, model: str, chat: bool) -> None:
    """Raises UserError for a class that cannot be imported or is no environment, and for a chat template that cannot
    continue a conversation. `model`: the policy's name. `chat`: prompts.format is "chat"."""
    if cfg.function is not None:
        check_class(cfg.function)
        if chat:
            check_template(tokenizer, model)


def check_class(function: str) -> None:
    """Raises UserError unless `module:Class` can be imported and has the methods of an environment."""
    with TemporaryDirectory() as directory:
        result = Path(directory, "fault.json")
        path = json.dumps([package_root(), *sys.path])
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _SCRIPT, function, path, str(result)],
                env={**os.environ, "PYTHONPATH": package_root()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=IMPORT_S,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"environment.function ({function}) took longer than {IMPORT_S:g} s to import") from None
        if not result.exists():
            printed = done.stdout[-10_000:].decode(errors="replace").strip().splitlines()
            last = f" (the last line it printed: {one_line(printed[-1], 200)})" if printed else ""
            raise UserError(
                f"environment.function ({function}) ended its process, with exit code {done.returncode}, while its "
                f"module was imported{last}"
            )
        fault = json.loads(result.read_text())
    if fault is not None:
        raise UserError(explain_import(function, "environment.function", UserCodeError(**fault)))
