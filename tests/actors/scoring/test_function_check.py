"""A function is tried once before anything starts: which are refused, and which only cause a warning."""

from __future__ import annotations

import re
import sys

import pytest

from actors.scoring.function_check import check_import, try_function
from common.config.actors import SourcesConfig
from common.config.sources import FunctionSourceConfig
from common.errors import UserError
from common.types import RewardInput

ANSWER = RewardInput("ask a3", "a made-up response", 3, "stop", {"k": 1}, None, "a made-up response", [3, 4], [5, 6, 7])
FUNCTIONS = """
import os, time
from common.types import RewardInput


def fine(answer: RewardInput) -> float:
    assert answer == RewardInput("ask a3", "a made-up response", 3, "stop", {"k": 1}, None, "a made-up response",
                                 [3, 4], [5, 6, 7])
    return 1


async def awaited(answer): return 0.5
def listed(answers: list[RewardInput]): return [{"score": 1.0, "ok": True} for _ in answers]
def none(answer): return None
def text(answer): return "0.5"
def true(answer): return True
def generator(answer): return (x for x in [1.0])
def coroutine(answer): return awaited(answer)
def too_few(answers: list[RewardInput]): return []
def typo(answer): return answer.respnse
def typo_elsewhere(answer): return answer.response.uper()
def noargs(): return 1
def splits(answer): return float(answer.response.split()[100])
def not_a_number(answer): return float("nan")
def too_large(answer): return 1e39
def exits(answer): raise SystemExit(3)
def sleeps(answer): time.sleep(60)
def ends(answer): print("no licence", flush=True); os._exit(3)
"""


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Tries a function of FUNCTIONS, and returns the warning."""
    (tmp_path / "tried_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)

    def attempt(name: str, check=lambda *sources: try_function(*sources, ANSWER), **settings):
        cfg = FunctionSourceConfig(name="s", function=f"tried_functions:{name}")
        return check(cfg, SourcesConfig(sources=(cfg,), **settings))

    return attempt


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize("name", ["fine", "awaited", "listed"])
def test_a_good_function_passes_silently_and_is_not_imported_here(tried, capfd, name, isolation):
    assert tried(name, isolation=isolation) == ""
    assert "tried_functions" not in sys.modules
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "returned None where a number is needed; return the score as a number, or a dict with it"),
        ("text", r"returned '0\.5' \(str\) where a number is needed"),
        ("true", r"returned True \(bool\) where a number is needed"),
        ("generator", "returned a generator where a number is needed"),
        ("coroutine", "declare the function itself with async def"),
        ("too_few", "returned 0 scores for 1 answers; return one for each, in the same order$"),
        ("typo", "raised AttributeError: .*'respnse'.*; it has prompt, response, response_tokens, "),
        ("noargs", r"takes \(\), but is called with one RewardInput"),
        ("nowhere", r"module tried_functions \(.*tried_functions\.py\) has no function nowhere"),
        (
            "ends",
            r"it ended with exit code 3 \(the last line it printed: no licence\); fix it, or set reward.isolation",
        ),
    ],
)
def test_a_function_that_never_gives_a_score_is_refused(tried, name, message):
    with pytest.raises(UserError, match=rf"reward source s \(tried_functions:{name}\).*{message}"):
        tried(name)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("splits", {}, r"raised IndexError: list index out of range \(tried_functions.py, line \d+\)"),
        ("typo_elsewhere", {}, "raised AttributeError: 'str' object has no attribute 'uper'"),
        ("not_a_number", {}, "returned nan"),
        ("too_large", {}, r"returned 1e\+39, which float32 cannot hold"),
        ("exits", {}, "raised SystemExit: 3"),
        ("sleeps", {"call_timeout_s": 0.5}, r"took longer than call_timeout_s \(0.5 s\)"),
        ("ends", {"isolation": "process"}, r"it ended with exit code 3 \(the last line it printed: no licence\)"),
    ],
)
def test_a_failure_that_may_depend_on_the_response_is_a_warning(tried, name, settings, message):
    warning = tried(name, **settings)
    assert warning.startswith(f"reward source s (tried_functions:{name}), tried on the first prompt with a made-up")
    assert re.search(message, warning)
    assert "\n" not in warning


def test_the_check_of_ratchet_submit_imports_but_does_not_call(tried):
    assert tried("ends", check_import) is None
    with pytest.raises(UserError, match="has no function nowhere"):
        tried("nowhere", check_import)
