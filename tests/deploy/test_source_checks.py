"""All sources of a run are checked before anything starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from actors.scoring import kinds
from common.config.actors import SourcesConfig
from common.config.sources import FunctionSourceConfig, HttpSourceConfig, RewardSource
from common.data.prompt_records import PromptRecord
from common.errors import UserError
from common.model.files import load_tokenizer
from common.reward_input import RewardInput
from deploy.source_checks import MADE_UP, check_sources, try_sources
from tests.fakes import save_tiny_model

MESSAGES = [{"role": "user", "content": "ask a3"}]
RECORD = PromptRecord("ask a3", np.array([3, 4], dtype=np.int32), {"k": 1}, MESSAGES)


class ProbeConfig(RewardSource):
    """A source of a kind that reports what it was asked."""


@pytest.fixture
def asked(monkeypatch):
    """Calls of the functions of the probe's kind, in order. Its model has the size 7, and its try gives a warning."""
    calls: list[tuple] = []

    def note(name: str, result=None):
        return lambda cfg, *arguments: (calls.append((name, cfg.name, *arguments)), result)[1]

    kind = kinds.SourceKind(
        make=note("make"),
        check=note("check"),
        model_size=note("model_size", 7),
        try_once=note("try_once", "it is slow"),
    )
    monkeypatch.setattr(kinds, "KINDS", {**kinds.KINDS, ProbeConfig: kind})
    return calls


def test_every_source_is_checked_and_those_with_models_returned(asked):
    function = FunctionSourceConfig(name="f", function="m:f")  # loads no model
    first, second = ProbeConfig(name="a"), ProbeConfig(name="b")
    assert check_sources([first, function, second], chat=True) == [(first, 7), (second, 7)]
    assert asked[:2] == [("check", "a", True), ("check", "b", True)]


def test_a_key_that_is_not_set_is_refused_before_other_checks(asked, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    service = HttpSourceConfig(name="h", urls=["http://h"], headers={"X-Api-Key": "env:NO_SUCH_KEY"})
    with pytest.raises(UserError, match="environment variable NO_SUCH_KEY, which is not set here"):
        check_sources([ProbeConfig(name="a"), service], chat=False)
    assert asked == []


def test_sources_are_tried_on_the_first_prompt_and_warnings_printed(asked, tmp_path, capfd):
    tokenizer = load_tokenizer(save_tiny_model(tmp_path))
    service = SourcesConfig(sources=())
    capfd.readouterr()
    try_sources(service, [ProbeConfig(name="a")], RECORD, tokenizer)
    ids = tokenizer(MADE_UP, add_special_tokens=False)["input_ids"]
    answer = RewardInput("ask a3", MADE_UP, len(ids), "stop", {"k": 1}, MESSAGES, MADE_UP, [3, 4], ids)
    assert asked == [("try_once", "a", service, answer)]
    assert len(ids) > 0
    try_sources(service, [ProbeConfig(name="a")], RECORD, tokenizer, episode=True)
    turn = {"text": MADE_UP, "observation": [], "reward": 0.0, "info": {}}
    assert asked[1:] == [("try_once", "a", service, replace(answer, turns=(turn,)))]
    assert capfd.readouterr().err == 2 * "ratchet: warning: it is slow\n"
