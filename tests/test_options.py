"""Every option that a help text, a message, a page or a comment names exists, and is one of the command that it is for.

An option that follows a command, as in `ratchet train --resume RUN`, must be one of that command. Any other option must
be one of the commands that the text is for: its own command in a help text, those of COMMANDS_OF in a module, and any
command on a page.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import click
import pytest
import typer.main

from deploy.cli import app
from deploy.command_line import ROOTS, settings_text
from tests.test_docs import ROOT, TEXTS

OPTION = re.compile(r"(?<![\w!-])--[a-z][a-z-]*(?![\w-]|\.\w)")  # settings of other programs have dots and underscores
# A program with its subcommand, and what may be between it and its options: words, but no end of a phrase.
PROGRAM = re.compile(
    r"\b(ratchet(?: cluster)?(?: [a-z][a-z-]*)?|ray [a-z-]+|kubectl|docker|pip|python -m [\w.]+|tensorboard|prometheus"
    r"|grafana|sed)\b[^`;,:()\n]*$"
)
ANY = frozenset({"any"})
# The commands that show the messages of a module, by the beginning of its path.
COMMANDS_OF = {
    "deploy/audit.py": {"audit"},
    "deploy/critic_checks.py": {"train-critic"},
    "deploy/demo.py": {"demo"},
    "deploy/evaluation/": {"evaluate"},
    "deploy/export.py": {"export"},
    "deploy/journal_parts.py": {"train", "train-critic"},  # the notes of runs
    "deploy/monitoring/installation.py": {"monitoring"},
    "deploy/plan/command.py": {"plan"},
    "deploy/plan/machines.py": {"plan"},
    "deploy/plan/rates.py": {"plan"},
    "deploy/plan/seconds.py": {"plan"},
    "deploy/plan/step.py": {"plan"},
    "deploy/plan/suggest.py": {"plan"},
    "deploy/replay.py": {"replay", "audit"},
    "deploy/restarts.py": {"train"},
    "deploy/sample_journal.py": {"train-critic"},
    "deploy/sample_pairs.py": {"sample-pairs"},
    "deploy/submit.py": {"submit"},
    "deploy/train.py": {"train"},
    "deploy/train_critic.py": {"train-critic"},
    "deploy/train_reward.py": {"train-reward"},
    "deploy/tune/trial_process.py": {"train"},
    "deploy/tune/": {"tune"},
    "deploy/variance/": {"evaluate"},
    "deploy/cluster/kuberay.py": {"cluster kuberay"},
    "deploy/cluster/pods.py": {"cluster kuberay"},
    "learner/critic/": {"train-critic"},
    "learner/variance/": {"evaluate"},
}
# Options of other programs, where the text does not name the program before them.
FOREIGN = {
    "deploy/cluster/commands.py": {"--run", "--address"},  # ratchet submit
    "deploy/cluster/own_cluster.py": {"--shm-size"},  # docker
    "deploy/plan/rates.py": {"--query-gpu", "--format"},  # nvidia-smi
    "deploy/plan/machines.py": {"--query-gpu", "--format"},
    "deploy/run/provenance.py": {"--show-toplevel", "--porcelain", "--untracked-files", "--no-optional-locks"},  # git
    "deploy/cluster/job.py": {"--python_worker_command"},
    "deploy/submit.py": {"--dashboard-agent-listen-port"},  # ray start
    "CONTRIBUTING.md": {"--big"},  # tests.gpu_check
    "docs/clusters.md": {"--block", "--build-arg"},  # ray start, docker
    "docs/monitoring.md": {"--logdir"},  # tensorboard
    "docs/plan.md": {"--gpu"},  # tests.bench.rates
}


def all_commands() -> dict[str, click.Command]:
    """Every command by its words after `ratchet`; "" is `ratchet` itself."""

    def found(command: click.Command, words: str) -> Iterator[tuple[str, click.Command]]:
        yield words, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from found(inner, f"{words} {name}".strip())

    return dict(found(typer.main.get_command(app), ""))


COMMANDS = all_commands()
OPTIONS = {
    name: {"--help"} | {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
    for name, command in COMMANDS.items()
}


def wrong_options(text: str, commands: Collection[str], foreign: Collection[str] = ()) -> list[str]:
    """The options in `text` that do not exist. `commands`: those that the text is for, or ANY."""
    of_text = [name for name in OPTIONS if commands == ANY or name in commands]
    wrong = []
    for named in OPTION.finditer(text):
        option, program = named.group(), PROGRAM.search(text[: named.start()])
        words = program.group(1) if program else ""
        if program and (later := [word for word in program.group().split() if "-" in word and word in COMMANDS]):
            words = f"ratchet {later[-1]}"  # "ratchet train or train-critic --sample"
        if words == "ratchet" and program.group().startswith("ratchet ..."):  # the command is a value of the text
            continue
        if words.startswith("ratchet"):
            name = words.removeprefix("ratchet").strip()
            if option not in OPTIONS.get(name, ()):
                wrong.append(f"{words} {option}")
        elif not program and option not in foreign and not any(option in OPTIONS[name] for name in of_text):
            wrong.append(option)
    return wrong


def texts_of(node: ast.AST) -> Iterator[str]:
    """The texts of a module or function, each formatted one as a whole, with ... for every value."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts_of(child)


def command_of(node: ast.AST, path: Path) -> str | None:
    """The command that a function is, by its decorator."""
    for decorator in getattr(node, "decorator_list", []):
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) in ("app.command", "run_command"):
            group = "cluster " if path.name == "commands.py" and path.parent.name == "cluster" else ""
            return group + node.name.replace("_", "-")
    return None


FILES = sorted(path for layer in ("common", "actors", "learner", "deploy") for path in (ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_text_names_only_options_of_its_command(name):
    command = COMMANDS[name]
    texts = [command.help, command.epilog, *(getattr(param, "help", None) for param in command.params)]
    assert [wrong for text in texts for wrong in wrong_options(text or "", {name})] == []


@pytest.mark.parametrize("name", ROOTS)
def test_the_description_of_settings_names_only_options_of_their_command(name):
    assert wrong_options(settings_text(name), {name}) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_and_docstrings_name_only_options_of_their_commands(path):
    name = str(path.relative_to(ROOT))
    foreign = FOREIGN.get(name, ())
    commands = next((commands for start, commands in COMMANDS_OF.items() if name.startswith(start)), ANY)
    wrong = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        own = command_of(node, path)
        if own is not None:
            assert own in COMMANDS
        of_node = commands if own is None else {own}
        wrong += [found for text in texts_of(node) for found in wrong_options(text, of_node, foreign)]
    assert wrong == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_a_page_names_only_options_that_exist(path):
    """In blocks, other programs have options too; tests/test_doc_commands.py parses the lines of `ratchet` there."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert wrong_options(text, ANY, FOREIGN.get(str(path.relative_to(ROOT)), ())) == []


def test_the_function_of_every_command_is_found():
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES if path.is_relative_to(ROOT / "deploy")
    }
    found = {command_of(node, path) for path, tree in trees.items() for node in tree.body}
    assert found - {None} == COMMANDS.keys() - {"", "cluster"}


def test_options_of_other_commands_are_found():
    assert wrong_options("a file; --resume: a setting", {"plan"}) == ["--resume"]
    assert wrong_options("a file; --resume: a setting", {"plan", "train"}) == []
    assert wrong_options("continue with ratchet plan --resume RUN", ANY) == ["ratchet plan --resume"]
    assert wrong_options("see `ratchet train RUN --address X --replay`", {"audit"}) == ["ratchet train --replay"]
    assert wrong_options("`ray start --head`, or --head", {"train"}) == ["--head"]
    assert wrong_options("--actor.adam.lr, --rollout_batch_size and --run.", {"train"}) == []
    assert wrong_options("ratchet --version and ratchet --resume", ANY) == ["ratchet --resume"]
    assert wrong_options("of ratchet train or train-critic --sample, a copy", ANY) == []
    assert wrong_options("ratchet no-such --run", ANY) == ["ratchet no-such --run"]


def test_every_entry_of_the_tables_is_needed():
    assert {start for start in COMMANDS_OF if not (ROOT / start).exists()} == set()
    for name, foreign in FOREIGN.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert {option for option in foreign if option not in text} == set()
