"""The check of an environment before a run: its class in a process of its own, and the model's chat template."""

import subprocess
import sys

import pytest

from actors.environments import check
from actors.environments.check import check_class, check_environment
from common.config.environment import EnvironmentConfig
from common.errors import UserError
from common.user_code.import_path import find_users_modules
from tests.actors.environments import templates
from tests.actors.environments.templates import with_template

GAMES = "tests.actors.environments.games"


def refusal(function):
    with pytest.raises(UserError) as caught:
        check_class(function)
    message = str(caught.value)
    assert message.startswith(f"environment.function ({function})")
    return message


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user next to the config file."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        find_users_modules(tmp_path)

    return write


def test_a_module_next_to_the_config_file_is_found_and_not_imported_here(module):
    module("my_game", "from common.environment import Step\nclass Game:\n    def step(self, message): return Step()\n")
    check_class("my_game:Game")
    assert "my_game" not in sys.modules


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NoStep", "has no method step; write async def step(self, message) -> Step"),
        ("WithArguments", "must be made without arguments"),
        ("WrongStep", "must have a method step that takes a message"),
        ("Missing", "has no function Missing"),
    ],
)
def test_a_class_that_is_no_environment_is_refused(name, reason):
    assert reason in refusal(f"{GAMES}:{name}")


def test_a_module_that_cannot_be_imported_is_refused_with_the_reason(module):
    assert "it must be installed, in the directory ratchet is started from, or next to" in refusal("not_there:Game")
    module("broken_game", "1 / 0\n")
    assert "cannot be imported (ZeroDivisionError: division by zero)" in refusal("broken_game:Game")
    module("dying_game", "import os\nprint('so long', flush=True)\nos._exit(3)\n")
    message = refusal("dying_game:Game")
    assert "ended its process, with exit code 3, while its module was imported" in message
    assert "(the last line it printed: so long)" in message


def test_an_import_that_does_not_end_is_refused(module, monkeypatch):
    monkeypatch.setattr(check, "IMPORT_S", 0.5)
    module("slow_game", "import time\ntime.sleep(1000)\n")
    assert "took longer than 0.5 s to import" in refusal("slow_game:Game")


def test_the_chat_template_is_checked_with_prompts_in_chat_form_only():
    cfg, tokenizer = EnvironmentConfig(function=f"{GAMES}:Counting"), with_template(templates.QWEN_3)
    check_environment(cfg, tokenizer, model="org/model", chat=False)
    with pytest.raises(UserError, match="the chat template of org/model drops the reasoning"):
        check_environment(cfg, tokenizer, model="org/model", chat=True)
    check_environment(cfg.model_copy(update={"sequence": "turn"}), tokenizer, model="org/model", chat=True)


def test_the_refusal_of_an_agents_template_names_no_other_format():
    """An agent needs prompts.format = "chat"."""
    cfg = EnvironmentConfig(agent="tests.actors.environments.agents:twice")
    remedies = 'set environment.sequence = "turn", or give the model a chat_template'
    with pytest.raises(UserError, match=remedies) as caught:
        check_environment(cfg, with_template(templates.QWEN_3), model="org/model", chat=True)
    assert "plain" not in str(caught.value)


def test_the_protocol_needs_only_the_standard_library():
    script = (
        "import sys; before = set(sys.modules); import common.environment; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - {'common'}; "
        "print(sorted(new - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
