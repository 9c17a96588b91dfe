"""Updates with compiled layers against updates without. torch's "eager" takes the place of its compiler: it traces the
same graphs, and runs their operations one by one, so every bit must be the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from learner.ppo.learner import Learner
from tests.fakes import make_experience, save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import UNUSUAL, parameters, varied_batch
from tests.tracing import graphs, trace_only

ADAPTERS = {"lora": {"rank": 4, "alpha": 8}}
VARIANTS: dict[str, dict[str, Any]] = {
    "one trunk": {},
    "a critic of its own, recomputed": {"critic": "separate", "gradient_checkpointing": True},
    "adapters": ADAPTERS,
}


def make_learner(model, **learner: Any) -> Learner:
    settings = {**UNUSUAL, "learner": {**UNUSUAL["learner"], **learner}}
    settings["reward"] = {**UNUSUAL["reward"], "sources": [{"name": "a_words", "function": "tests.tasks:a_words"}]}
    return Learner(tiny_config(model, rollouts_per_step=8, **settings))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_compiled_layers_change_no_bit_of_two_updates(variant, tmp_path, monkeypatch, capsys):
    trace_only(monkeypatch)
    model = save_tiny_model(tmp_path)
    plain, compiled = (make_learner(model, compile=on, **variant) for on in (False, True))
    for seed in range(2):
        expected, found = (learner.update(varied_batch(seed)) for learner in (plain, compiled))
        timeless = [{k: v for k, v in stats.items() if not k.startswith("time/")} for stats in (expected, found)]
        assert timeless[1] == timeless[0]
    assert torch.equal(parameters(compiled), parameters(plain))
    rows = [make_experience(i, [4 + i, 7, 1][: 1 + i]).rollout for i in range(3)]
    for name in ("policy_logprobs", "ref_logprobs") if "lora" in variant else ("policy_logprobs",):
        assert all(map(np.array_equal, getattr(compiled, name)(*rows), getattr(plain, name)(*rows)))
    assert 1 <= graphs() <= 2  # with adapters, one more when they are off
    assert capsys.readouterr().out == ""
