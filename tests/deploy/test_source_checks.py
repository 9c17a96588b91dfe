"""Sources are tried once before anything starts: which are refused, and which only cause a warning."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config.actors import SourcesConfig
from common.config.sources import FunctionSourceConfig, ModelSourceConfig
from common.data import prompt_tokens
from common.data.prompt_records import PromptRecord
from common.errors import UserError
from common.model.files import load_tokenizer
from common.model.reward_head import ScoreScale, load_reward_model, save_reward_model, write_scale
from deploy.source_checks import MADE_UP, try_sources
from tests.fakes import save_tiny_model

RECORD = PromptRecord("ask a3", np.array([3, 4], dtype=np.int32), {"k": 1}, [{"role": "user", "content": "ask a3"}])
FUNCTIONS = f"""
import os, time
from common.types import RewardInput


def fine(answer: RewardInput) -> float:
    assert (answer.prompt, answer.response, answer.fields) == ("ask a3", {MADE_UP!r}, {{"k": 1}})
    assert list(answer.prompt_ids) == [3, 4]
    assert len(answer.response_ids) == answer.response_tokens > 0
    return 1


async def awaited(answer): return 0.5
def listed(answers: list[RewardInput]): return [{{"score": 1.0, "ok": True}} for _ in answers]
def none(answer): return None
def text(answer): return "0.5"
def true(answer): return True
def generator(answer): return (x for x in [1.0])
def coroutine(answer): return awaited(answer)
def too_few(answers: list[RewardInput]): return []
def typo(answer): return answer.respnse
def noargs(): return 1
def splits(answer): return float(answer.response.split()[100])
def not_a_number(answer): return float("nan")
def exits(answer): raise SystemExit(3)
def sleeps(answer): time.sleep(60)
def ends(answer): print("no licence", flush=True); os._exit(3)
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def tried(tmp_path, monkeypatch, tokenizer):
    """Tries a function of FUNCTIONS."""
    (tmp_path / "tried_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)

    def attempt(name: str, **settings) -> None:
        source = FunctionSourceConfig(name="s", function=f"tried_functions:{name}")
        try_sources(SourcesConfig(sources=(source,), **settings), [source], RECORD, tokenizer)

    return attempt


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_good_function_passes_silently_and_is_not_imported_here(tried, capfd, isolation):
    for name in ("fine", "awaited", "listed"):
        tried(name, isolation=isolation)
    assert "tried_functions" not in sys.modules
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "returned None where a number is needed"),
        ("text", r"returned '0\.5' \(str\) where a number is needed"),
        ("true", r"returned True \(bool\) where a number is needed"),
        ("generator", "returned a generator where a number is needed"),
        ("coroutine", "declare the function itself with async def"),
        ("too_few", "returned 0 scores for 1 answers"),
        (
            "typo",
            "raised AttributeError: .*'respnse'.*; it has prompt, response, response_tokens, ",
        ),
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
        ("not_a_number", {}, "returned nan"),
        ("exits", {}, "raised SystemExit: 3"),
        ("sleeps", {"call_timeout_s": 0.5}, r"took longer than call_timeout_s \(0.5 s\)"),
        ("ends", {"isolation": "process"}, r"it ended with exit code 3 \(the last line it printed: no licence\)"),
    ],
)
def test_a_failure_that_may_depend_on_the_response_is_a_warning(tried, capfd, name, settings, message):
    tried(name, **settings)
    warning = capfd.readouterr().err
    assert warning.startswith(f"ratchet: warning: reward source s (tried_functions:{name}), tried on the first prompt")
    assert re.search(message, warning)
    assert warning.count("\n") == 1


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model with the tiny policy's tokenizer and 64 rows in its embedding."""
    policy, target = save_tiny_model(tmp_path_factory.mktemp("policy")), tmp_path_factory.mktemp("models") / "rm"
    network = load_reward_model(policy, dtype=torch.float32, device=torch.device("cpu"))
    save_reward_model(network, policy, target, ScoreScale())
    return target


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        ("{{ messages[1].content }}", True, None),
        (None, False, None),
        (None, True, "its tokenizer or chat template refuses the first prompt: Cannot use chat template functions"),
        ("{{ raise_exception('no users') }}", None, "refuses the first prompt: no users; give the model's tokenizer"),
        (ENDLESS, True, "refuses the first prompt: it did not end within 0.1 s of computing"),
    ],
)
def test_a_reward_model_that_cannot_read_the_first_prompt_is_refused(
    tmp_path, monkeypatch, tokenizer, reward_model, template, chat, reason
):
    monkeypatch.setattr(prompt_tokens._TemplateClock, "TICK_S", 0.05)
    monkeypatch.setattr(prompt_tokens._TemplateClock, "LIMIT", 2)
    monkeypatch.setattr(prompt_tokens, "_clock", prompt_tokens._TemplateClock())
    directory = shutil.copytree(reward_model, tmp_path / "rm")
    own = load_tokenizer(directory)
    own.chat_template = template
    own.save_pretrained(directory)
    write_scale(directory, ScoreScale(chat=chat))
    source = ModelSourceConfig(name="s", model=str(directory))
    service = SourcesConfig(sources=(source,))
    if reason is None:
        return try_sources(service, [source], RECORD, tokenizer)
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        try_sources(service, [source], RECORD, tokenizer)
    assert str(caught.value).startswith(f"reward source s ({directory}): its tokenizer or chat template")


def test_a_reward_model_whose_tokenizer_is_anothers_is_refused(tmp_path, tokenizer, reward_model):
    directory = shutil.copytree(reward_model, tmp_path / "rm")
    own = load_tokenizer(directory)
    own.add_tokens(["a3!"])
    own.save_pretrained(directory)
    write_scale(directory, ScoreScale(chat=False))
    source = ModelSourceConfig(name="s", model=str(directory))
    record = replace(RECORD, text="ask a3!", messages=None)
    with pytest.raises(UserError, match=r"it has 'a3!', token 64, but the model's embedding has 64 rows"):
        try_sources(SourcesConfig(sources=(source,)), [source], record, tokenizer)
