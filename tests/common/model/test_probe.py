"""The probe at load accepts correct models and refuses the others with the reason."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from common.errors import UserError
from common.model.attention import PACKED
from common.model.files import load_policy
from common.model.kernels import install
from common.model.packing import Sequences
from common.model.probe import UnsuitedModelError, check_packed, eager_results
from common.model.recomputed_layers import checkpoint_activations
from common.model.small_model import randomise, small_config
from tests.fakes import save_tiny_model

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}


def small(kind: str, **changed) -> PreTrainedModel:
    config = CONFIG_MAPPING[kind](**changed)
    model = AutoModelForCausalLM.from_config(small_config(config), dtype=torch.float32, attn_implementation=PACKED)
    return randomise(model).eval()


def probe(model, change=lambda model: None):
    expected = eager_results(model)
    change(model)
    check_packed(model, expected)


def test_a_model_passes_with_the_learners_kernels():
    probe(small("llama"), install)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("stablelm", "do not pass `lengths`, the sizes of packed sequences, on to their attention"),
        ("lfm2", "mix the sequences of a packed row"),
        ("falcon_mamba", "mix the sequences of a packed row"),
        ("doge", "attention is not the packed one"),
        ("modernbert-decoder", "changes its logits after the output embedding in an unknown way"),
    ],
)
def test_models_that_cannot_be_packed_are_refused_with_the_reason(kind, reason):
    layers = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2} if kind == "lfm2" else {}
    with pytest.raises(UnsuitedModelError, match=reason):
        probe(small(kind, **layers))


def test_a_kernel_with_wrong_results_is_found():
    def change(model):
        norm = model.model.norm
        original = norm.forward
        norm.forward = lambda x: original(x) * 1.01

    with pytest.raises(UnsuitedModelError, match="differ"):
        probe(small("llama"), change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "gemma2"])
def test_correct_models_pass_in_both_precisions(kind, dtype):
    model = small(kind).to(dtype)
    probe(model)
    assert model.config._attn_implementation == PACKED


def test_a_refused_model_is_named_with_its_setting_and_type(tmp_path):
    small("stablelm").save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_policy(tmp_path, **CPU)
    message = str(caught.value)
    assert message.startswith(f"model.path ({tmp_path}), a stablelm model, cannot be trained: its layers do not pass")
    assert message.endswith("docs/models.md lists what is supported")


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    save_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its weight model.layers.1.mlp.up_proj.weight has numbers that are not fin"):
        load_policy(tmp_path, **CPU)


def test_missing_and_surplus_weights_are_refused_by_name(tmp_path):
    save_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole = model.state_dict()
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in whole.items() if k != "model.norm.weight"})
    with pytest.raises(UserError, match=r"model.norm.weight is not in its files"):
        load_policy(tmp_path, **CPU)
    model.save_pretrained(tmp_path, state_dict={**whole, "model.layers.2.extra": torch.ones(1)})
    with pytest.raises(UserError, match=r"its config.json has no place for \(model.layers.2.extra\)"):
        load_policy(tmp_path, **CPU)


# Dropout


@pytest.mark.parametrize("kind", ["opt", "biogpt", "llama"])
def test_recomputed_layers_apply_no_dropout(kind):
    """In training mode OPT and BioGPT drop a tenth of the activations; they read their layer's flag."""
    model = small(kind)
    ids = torch.arange(3, 15)
    sequences = Sequences.pack([ids[:2].numpy(), ids[5:6].numpy()], [ids[2:5].numpy(), ids[6:].numpy()])

    def gradients():
        model.zero_grad()
        states, _ = sequences.response_states(model.base_model)
        (states * states.detach().cos()).sum().backward()
        return [parameter.grad.clone() for parameter in model.base_model.parameters() if parameter.grad is not None]

    def kept():
        count = 0

        def keep(x):
            nonlocal count
            count += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            sequences.response_states(model.base_model)
        return count

    plain, all_kept = gradients(), kept()
    checkpoint_activations(model)
    assert kept() < all_kept / 2  # so layers really are recomputed
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
