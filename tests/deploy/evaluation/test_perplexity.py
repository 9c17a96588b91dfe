"""Perplexity of texts through the reference service, against transformers' own passes over single windows."""

import asyncio
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.pool.pool import Pool
from actors.scoring.reference import ReferencePolicy
from common.errors import UserError
from deploy.evaluation.perplexity import TextMeasurement
from deploy.evaluation.texts import load_texts
from deploy.policy_files import PolicyFiles
from tests.fakes import WORDS, LocalHost, save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """A base and another policy."""
    directories = [save_tiny_model(tmp_path_factory.mktemp("model"), seed=seed, context=16) for seed in (0, 1)]
    return {name: PolicyFiles.load(str(path)) for name, path in zip(("base", "other"), directories)}


@pytest.fixture
def cfg(policies, tmp_path):
    (tmp_path / "own.txt").write_text(" ".join(np.random.default_rng(0).choice(WORDS[4:], 40)))
    evaluation = {"text": str(tmp_path / "own.txt"), "text_tokens": 35, "text_window": 6}
    # Another temperature of sampling must not change the perplexity.
    return tiny_config(policies["base"].path, evaluation=evaluation, sampling={"temperature": 0.5})


class LocalStart:
    """`deploy.starting.Starter` in this process."""

    async def references(self, cfg, *, model, temperature):
        host = LocalHost(ReferencePolicy, cfg.reference, model=model, temperature=temperature)
        self.pool = await Pool(host, cfg.reference).start(5)
        return self.pool


def measured(cfg, run, policies, *names):
    """The measurement with these policies measured, and the windows that the progress saw."""
    measurement, seen = TextMeasurement(cfg, run, load_texts(cfg, list(policies.values()))), []

    async def measure():
        for name in names:
            start = LocalStart()
            await measurement.measure(name, policies[name], start, lambda *windows: seen.append(windows))
            start.pool.stop()

    asyncio.run(measure())
    return measurement, seen


def nll_by_hand(model, window):
    ids = torch.tensor([*window.prompt.token_ids.tolist(), *window.response_ids.tolist()])
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    first = len(window.prompt.token_ids)
    return sum(-logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(first, len(ids)))


def test_perplexity_is_that_of_transformers_at_temperature_one(cfg, tmp_path, policies):
    measurement, seen = measured(cfg, tmp_path, policies, "base", "other")
    texts = load_texts(cfg, list(policies.values()))
    total = sum(len(text.windows) for text in texts)
    assert seen == 2 * [(n, total) for n in range(1, 1 + total)]
    models = {
        name: AutoModelForCausalLM.from_pretrained(p.directory, dtype=torch.float32) for name, p in policies.items()
    }
    for text in texts:
        by_hand = {name: [nll_by_hand(model, window) for window in text.windows] for name, model in models.items()}
        tokens = sum(len(window.response_ids) for window in text.windows)
        expected = {name: math.exp(sum(nll) / tokens) for name, nll in by_hand.items()}
        for name in policies:
            figures = measurement.figures(name, "base")
            found = figures["perplexity"][text.name]
            assert found["value"] == pytest.approx(expected[name], rel=1e-5)
            assert (found["tokens"], found["windows"]) == (tokens, len(text.windows))
            assert found["interval"][0] <= found["value"] <= found["interval"][1]
        assert figures["perplexity_ratio"][text.name]["value"] == pytest.approx(
            expected["other"] / expected["base"], rel=1e-5
        )
    assert set(measurement.figures("base", "base")) == {"perplexity"}
    assert set(measurement.figures("other", None)) == {"perplexity"}


def test_a_policy_is_measured_once_for_each_set_of_texts(cfg, tmp_path, policies):
    measurement, _ = measured(cfg, tmp_path, policies, "base")
    assert measurement.missing(["base", "other"]) == ["other"]
    texts = load_texts(cfg, list(policies.values()))
    assert TextMeasurement(cfg, tmp_path, texts).missing(["base"]) == []
    assert TextMeasurement(cfg, tmp_path, []).missing(["base", "other"]) == []
    assert TextMeasurement(cfg, tmp_path, texts[:1]).missing(["base"]) == ["base"]
    (tmp_path / "texts" / "base.json").write_text('{"digest": ')
    assert TextMeasurement(cfg, tmp_path, texts).missing(["base"]) == ["base"]
    assert TextMeasurement(cfg, tmp_path, texts).figures("base", None) == {"perplexity": {}}


def test_measuring_again_gives_the_same_bytes(cfg, tmp_path, policies):
    measured(cfg, tmp_path, policies, "base")
    first = (tmp_path / "texts" / "base.json").read_bytes()
    assert np.isfinite(json.loads(first)["nll"]["own"]).all()
    (tmp_path / "texts" / "base.json").unlink()
    measured(cfg, tmp_path, policies, "base")
    assert (tmp_path / "texts" / "base.json").read_bytes() == first


def test_a_text_with_log_probabilities_that_are_not_finite_is_refused(cfg, tmp_path, policies, monkeypatch):
    monkeypatch.setattr(
        ReferencePolicy, "forward", lambda self, rows: [np.full(len(r.response_ids), -np.inf) for r in rows]
    )
    with pytest.raises(UserError, match=r"model\d* gives log-probabilities of a text that are not finite"):
        measured(cfg, tmp_path, policies, "base")
    assert not (tmp_path / "texts").exists()
