"""Reward functions in worker processes: signals, crashes, hanging calls, and modules of any name."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from actors.scoring.function_source import FunctionSource
from actors.scoring.worker_process import Worker
from common.config.actors import SourcesConfig
from common.config.sources import FunctionSourceConfig
from common.errors import UserError
from common.types import RawScore, RewardInput

ANSWER = RewardInput(
    "question", "yes", 2, "stop", {"k": (1, 2)}, [{"role": "user", "content": "q"}], "yes</s>", [1], [2]
)

GRADERS = '''
import asyncio, ctypes, os, signal, subprocess, time
from common.types import RewardInput


def graded(answer: RewardInput) -> float:
    """Uses a signal, which only the main thread of a process can."""
    assert isinstance(answer, RewardInput)
    match answer.prompt:
        case "exits":
            os._exit(7)
        case "crashes":
            ctypes.string_at(0)
        case "hangs":
            while True:
                time.sleep(10)
        case "slow":
            signal.signal(signal.SIGALRM, interrupted)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            try:
                time.sleep(20)
            except TimeoutError:
                return -1.0
        case "starts a process and hangs":
            child = subprocess.Popen(["sleep", "300"])
            with open(answer.fields["pid_file"], "w") as file:
                file.write(str(child.pid))
            child.wait()
        case "raises":
            raise KeyError(answer.prompt)
        case "pid":
            return os.getpid()
    return float(len(answer.prompt))


def interrupted(*_):
    raise TimeoutError


def echo(answer):
    return {"score": 1, "same": answer == RewardInput(*ANSWER)}


ANSWER = ("question", "yes", 2, "stop", {"k": (1, 2)}, [{"role": "user", "content": "q"}], "yes</s>", [1], [2])


def listed(answers: list[RewardInput]) -> list:
    if any(answer.prompt == "exits" for answer in answers):
        os._exit(7)
    return [len(answers)] * len(answers)


async def overlapping(answer: RewardInput) -> float:
    if answer.prompt == "exits":
        await asyncio.sleep(0.2)
        os._exit(7)
    if answer.prompt == "waits":
        await asyncio.Event().wait()
    if answer.prompt == "blocks":
        time.sleep(60)
    await asyncio.sleep(0.4)
    return float(len(answer.prompt))


async def many(answers: list[RewardInput]) -> list[float]:
    return [float(number) for number in range(len(answers))]
'''


@pytest.fixture
def graders(tmp_path, monkeypatch):
    """A directory with a module of the user's."""
    (tmp_path / "process_graders.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source(function: str, *, call_timeout_s: float = 20.0, workers: int = 1) -> FunctionSource:
    cfg = FunctionSourceConfig(name="s", function=function)
    service = SourcesConfig(sources=(cfg,), isolation="process", call_timeout_s=call_timeout_s, workers=workers)
    return FunctionSource(cfg, service)


def ask(function: str, *prompts: str | RewardInput, together: bool = True, **settings) -> list[float | str]:
    """The score of each prompt, or the error. All are asked at once, or, without `together`, one after the other."""

    async def scenario():
        asked = source(function, **settings)
        answers = [replace(ANSWER, prompt=p) if isinstance(p, str) else p for p in prompts]
        try:
            if together:
                return await asyncio.wait_for(asyncio.gather(*map(asked, answers), return_exceptions=True), 60)
            return [(await asyncio.gather(asked(answer), return_exceptions=True))[0] for answer in answers]
        finally:
            asked.close()

    return [found.score if isinstance(found, RawScore) else str(found) for found in asyncio.run(scenario())]


def test_a_crash_an_exit_and_a_raise_cost_one_answer_each(graders):
    found = ask("process_graders:graded", "slow", "exits", "a", "crashes", "raises", "bb")
    assert found[:4] == [
        -1.0,
        "ended its process: it ended with exit code 7",
        1.0,
        "ended its process: it was ended by signal 11 (SIGSEGV)",
    ]
    assert found[4].startswith("raised KeyError: 'raises' (process_graders.py, line ")
    assert found[5] == 2.0


def test_a_call_past_its_limit_is_killed_with_what_it_started(graders):
    pid_file = graders / "pid"
    hangs = replace(ANSWER, prompt="starts a process and hangs", fields={"pid_file": str(pid_file)})
    found = ask("process_graders:graded", hangs, "a", call_timeout_s=2)
    assert found == ["took longer than call_timeout_s (2 s)", 1.0]
    assert runs_no_more(int(pid_file.read_text()))


def runs_no_more(pid: int) -> bool:
    """True if, within 10 s, the process is gone or a zombie."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_an_answer_arrives_as_it_was_sent(graders):
    async def scenario():
        asked = source("process_graders:echo")
        try:
            return await asked(ANSWER)
        finally:
            asked.close()

    assert asyncio.run(scenario()) == RawScore(1.0, "process_graders:echo", {"same": 1.0})


def test_several_workers_share_the_calls(graders):
    assert len(set(ask("process_graders:graded", "pid", "pid", "pid"))) == 1
    assert len(set(ask("process_graders:graded", "pid", "pid", workers=2))) == 2


def test_the_answer_of_a_list_that_ends_the_process_is_found(graders):
    assert ask("process_graders:listed", "a", "b", "c") == [3.0, 3.0, 3.0]
    ended = "ended its process: it ended with exit code 7"
    assert ask("process_graders:listed", "a", "exits", "c") == [1.0, ended, 1.0]


def test_an_async_call_that_ends_its_process_costs_no_other(graders):
    ended = "ended its process: it ended with exit code 7"
    found = ask("process_graders:overlapping", "a", "exits", "bb", "waits", call_timeout_s=3)
    assert found == [1.0, ended, 2.0, "took longer than call_timeout_s (3 s)"]


@pytest.mark.parametrize("prompts", [("blocks", "a", "bb"), ("a", "blocks", "bb")])
def test_an_async_call_that_blocks_its_process_costs_no_other(graders, monkeypatch, prompts):
    monkeypatch.setattr("actors.scoring.worker_process._GRACE_S", 0.5)
    found = ask("process_graders:overlapping", *prompts, call_timeout_s=1.5)
    late = "took longer than call_timeout_s (1.5 s)"
    assert found == [late if prompt == "blocks" else len(prompt) for prompt in prompts]


def test_a_call_that_began_during_a_blocking_one_is_not_blamed(graders, monkeypatch):
    monkeypatch.setattr("actors.scoring.worker_process._GRACE_S", 0.5)

    async def scenario():
        asked = source("process_graders:overlapping", call_timeout_s=1.5)
        try:
            blocks = asyncio.create_task(asked(replace(ANSWER, prompt="blocks")))
            await asyncio.sleep(1)
            return await asyncio.gather(asked(replace(ANSWER, prompt="a")), blocks, return_exceptions=True)
        finally:
            asked.close()

    later, blocks = asyncio.run(scenario())
    assert later.score == 1.0
    assert str(blocks) == "took longer than call_timeout_s (1.5 s)"


def test_first_calls_that_come_at_once_share_a_connection(graders):
    async def scenario():
        worker = Worker("process_graders:overlapping", takes="annotated", limit_s=30)
        try:
            return await asyncio.gather(*(worker.call([replace(ANSWER, prompt="x" * n)]) for n in range(1, 5)))
        finally:
            worker.kill()

    assert asyncio.run(scenario()) == [[(float(n), {})] for n in range(1, 5)]


def test_an_async_result_larger_than_the_sockets_buffer_arrives_whole(graders):
    async def scenario():
        worker = Worker("process_graders:many", takes="annotated", limit_s=30)
        try:
            return await worker.call([ANSWER] * 50_000)
        finally:
            worker.kill()

    assert [score for score, _ in asyncio.run(scenario())] == list(range(50_000))


@pytest.mark.parametrize("name", ["common", "learner"])
@pytest.mark.parametrize("has_init", [True, False])
def test_a_users_own_package_may_have_any_name(tmp_path, monkeypatch, name, has_init):
    package = tmp_path / name
    package.mkdir()
    if has_init:
        (package / "__init__.py").touch()
    (package / "grading.py").write_text("def points(answer):\n    return 5\n")
    (tmp_path / "my_reward.py").write_text(
        f"from {name}.grading import points\n\ndef score(answer):\n    return points(answer)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # as the command line adds it: last
    assert ask(f"{name}.grading:points", "a") == [5.0]
    assert ask("my_reward:score", "a") == [5.0]
    # In a thread of Ratchet's own process the name means Ratchet's package, and the message says so.
    for function in (f"{name}.grading:points", "my_reward:score"):
        cfg = FunctionSourceConfig(name="s", function=function)
        with pytest.raises(UserError) as caught:
            FunctionSource(cfg, SourcesConfig(sources=(cfg,)))
        assert f"{package} exists, but here the name {name} means Ratchet's own package" in str(caught.value)
        assert 'reward.isolation = "process"' in str(caught.value)


USES_BOTH = """
from common.mine import points
from common.types import RewardInput

def f(answer: RewardInput) -> float:
    assert isinstance(answer, RewardInput)
    return points
"""


def test_modules_that_a_users_package_lacks_are_found_in_ratchets(tmp_path, monkeypatch):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "mine.py").write_text("points = 7")
    (tmp_path / "uses_both.py").write_text(USES_BOTH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert ask("uses_both:f", "a") == [7.0]
    (tmp_path / "common" / "types.py").write_text("Mine = int")
    with pytest.raises(UserError, match=r"the name common means your own .*import it under `if TYPE_CHECKING:`"):
        source("uses_both:f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit(0)", "it ends the program while it is imported: exit code 0"),
        ("import os; os._exit(0)", "its process ended with exit code 0 while its module was imported"),
        ("def f(): return 1", r"takes \(\), but is called with one RewardInput"),
        ("f = 3", r"module bad_grader \(.*bad_grader.py\) has no function f"),
        (
            "import nowhere_to_be_found",
            "No module named 'nowhere_to_be_found'.*must be installed, in the directory ratchet is started from, or",
        ),
    ],
)
def test_a_module_or_function_that_cannot_be_used_is_refused(tmp_path, monkeypatch, text, message):
    (tmp_path / "bad_grader.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"reward source s \(bad_grader:f\).*{message}"):
        source("bad_grader:f")
