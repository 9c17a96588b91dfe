"""Weights of a separate critic that do not train: which they are, and that they do not change."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.model.size import model_size
from learner.critic.network import Critic
from learner.ppo.frozen import frozen_names
from learner.ppo.learner import Learner
from tests.common.model.model_kinds import listed
from tests.common.model.model_kinds import tiny_config as kind_config
from tests.fakes import save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import varied_batch

FAST = {"learning_rate": 1e-2, "value_head_learning_rate": 1e-2, "critic_learning_rate": 1e-2, "max_grad_norm": 1e9}
NAMES = ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.up_proj.weight", "norm.weight"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def learner_with(model, frozen, **fields) -> Learner:
    learner = {"precision": "fp32", "critic": "separate", "critic_frozen": frozen, **fields}
    return Learner(tiny_config(model, rollouts_per_step=8, optimizer=FAST, learner=learner))


@pytest.mark.parametrize(
    ("setting", "frozen"),
    [
        ("attention", {NAMES[1]}),
        ("*.mlp.*", {NAMES[2]}),
        (["embed_tokens.weight", "layers.[0-3].*"], set(NAMES[:3])),
        ("*", set(NAMES)),
        ([], set()),
    ],
)
def test_a_setting_names_attention_or_patterns(setting, frozen):
    assert frozen_names(NAMES, setting) == frozen


def test_norms_that_are_named_after_attention_are_no_attention():
    norms = ["layers.0.post_attention_layernorm.weight", "layers.0.self_attn_layer_norm.weight"]
    assert frozen_names([*norms, "h.1.attn.c_proj.bias"], "attention") == {"h.1.attn.c_proj.bias"}


@pytest.mark.parametrize("kind", listed("Supported"))
def test_attention_is_found_by_name_in_every_supported_model(kind):
    """It is what the classes of the modules say."""
    with torch.device("meta"):
        body = AutoModelForCausalLM.from_config(kind_config(kind)).base_model
    below = {
        f"{prefix}.{name}"
        for prefix, module in body.named_modules()
        if type(module).__name__.endswith("Attention")
        for name, _ in module.named_parameters()
    }
    assert below
    assert frozen_names([name for name, _ in body.named_parameters()], "attention") == below


def test_a_pattern_that_matches_nothing_is_refused_with_names_near_it(model):
    with pytest.raises(
        UserError, match=r"critic_frozen \(\*\.atn\.\*\) matches no .*; similar names: layers\.\d\.self_attn"
    ):
        learner_with(model, ["*.mlp.*", "*.atn.*"])
    with pytest.raises(UserError, match=r"critic_frozen \(attention\) matches no parameter"):
        frozen_names(["layers.0.mixer.weight"], "attention")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_frozen_weights_keep_their_bits_and_all_others_change(model, checkpointing):
    learner = learner_with(model, "attention", gradient_checkpointing=checkpointing)
    before = {name: value.clone() for name, value in learner.network.named_parameters()}
    for seed in range(2):
        learner.update(varied_batch(seed))
    unchanged = {name for name, value in learner.network.named_parameters() if torch.equal(value, before[name])}
    assert unchanged == {name for name in before if name.startswith("critic_body") and ".self_attn." in name}
    assert len(unchanged) == 2 * 4


def test_the_optimizer_has_no_group_and_no_state_for_frozen_weights(model):
    learner = learner_with(model, "*")
    learner.update(varied_batch(0))
    trained = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in learner.network.named_parameters() if not name.startswith("critic_body")}
    assert {id(p) for p in learner.optimizer.state} == trained


def test_a_critic_that_is_trained_before_a_run_has_the_same_weights_frozen(model):
    learner = learner_with(model, "*.mlp.*")
    critic = Critic.load(model, learner.cfg.learner, torch.device("cpu"), seed=0)
    for body in (learner.network.critic_body, critic.body):
        frozen = {name for name, p in body.named_parameters() if not p.requires_grad}
        assert frozen == {name for name, _ in body.named_parameters() if ".mlp." in name}


def test_freezing_changes_no_gradient_of_the_other_weights(model):
    """They are those of a critic that trains whole."""

    def gradients(frozen):
        """The gradients of the first optimizer step."""
        learner, found = learner_with(model, frozen), {}

        def keep(*_):
            found.update({n: p.grad.clone() for n, p in learner.network.named_parameters() if p.grad is not None})
            hook.remove()

        hook = learner.optimizer.register_step_pre_hook(keep)
        learner.update(varied_batch(0))
        return found

    some, every = gradients("attention"), gradients(None)
    assert len(every) - len(some) == 2 * 4
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, every[name], atol=1e-7, rtol=1e-5)


def test_the_size_of_a_model_has_the_names_of_a_critics_weights(model):
    learner = learner_with(model, "attention")
    assert model_size(model).body == {name: p.numel() for name, p in learner.network.critic_body.named_parameters()}
    assert sum(model_size(model).body.values()) == model_size(model).parameters  # the output embedding is tied
