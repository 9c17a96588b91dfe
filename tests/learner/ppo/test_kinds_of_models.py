"""One update of model types unlike Llama: the trained weights, and the saved policy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.experience_table import experience_table
from common.model.files import load_policy
from common.model.packing import Sequences, response_logprobs
from common.model.small_model import random_model
from learner.ppo.learner import Learner
from tests.common.model.model_kinds import tiny_config as kind_config
from tests.fakes import make_experience, save_tiny_model, tiny_config

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}
KINDS = {
    "gemma3": {},  # text and vision
    "gpt_oss": {},  # sinks
    "gemma2": {},  # caps
    "deepseek_v3": {},  # values narrower than keys, experts
    "opt": {"word_embed_proj_dim": 16},  # states narrower than layers
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("kind", "changes"), KINDS.items(), ids=KINDS)
def test_the_text_part_is_trained_and_saved(tmp_path, kind, changes, checkpointing):
    base = save_tiny_model(tmp_path / "base")
    random_model(kind_config(kind, **changes)).save_pretrained(base)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    learner = Learner(tiny_config(base, learner={"gradient_checkpointing": checkpointing}, rollouts_per_step=8))
    rows = [make_experience(i, [4 + i, 20, 9 + i, 1], score=float(i % 2)) for i in range(8)]
    metrics = learner.update(experience_table(rows))
    assert math.isfinite(metrics["ppo/grad_norm"])
    after = learner.network.policy.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision" in name or "projector" in name for name in moved)
    assert any(name.endswith("q_proj.weight") or "q_b_proj" in name for name in moved)
    if kind == "gpt_oss":
        assert any(name.endswith("sinks") for name in moved)

    learner.save_policy(tmp_path / "policy")
    saved = load_policy(tmp_path / "policy", **CPU)
    for name, value in saved.state_dict().items():
        assert torch.equal(value, after[name].bfloat16().float()), name
    sequences = Sequences.pack([np.array([3, 4]), np.array([5])], [np.array([9, 10, 11]), np.array([7, 1])])
    with torch.no_grad():
        learner.network.policy.bfloat16().float()  # rounded like the saved weights
        mine = response_logprobs(learner.network.policy, sequences, temperature=1.0)
        torch.testing.assert_close(response_logprobs(saved, sequences, temperature=1.0), mine, atol=1e-4, rtol=1e-4)
