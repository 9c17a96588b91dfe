"""Names and shapes of weights against the files of `save_pretrained`, and how many are in memory at once."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.model.files import load_tokenizer, save_policy
from common.model.saved_weights import as_saved
from common.model.size import constants, parameter_shapes
from tests.fakes import save_tiny_kind, save_tiny_model

EXPERTS = ["mixtral", "olmoe", "qwen3_moe", "glm4_moe"]


def saved(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return dict(as_saved(model, ((name, parameter.detach) for name, parameter in model.named_parameters())))


@pytest.mark.parametrize("kind", ["gpt2", *EXPERTS])
def test_names_and_values_are_those_of_the_files(tmp_path, kind):
    directory = save_tiny_kind(tmp_path, kind)
    files = load_file(directory / "model.safetensors")
    kept = constants(directory)
    found = saved(directory)
    assert found.keys() == files.keys() - kept.keys()
    assert all(torch.equal(found[name], files[name]) for name in found)
    assert parameter_shapes(directory) == {name: tuple(tensor.shape) for name, tensor in found.items()}
    assert ("model.layers.1.mlp.experts.3.up_proj.weight" in found) == (kind not in ("gpt2", "mixtral"))


def test_untrained_tensors_are_copied_from_the_base(tmp_path):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    directory = save_tiny_kind(tmp_path / "base", "glm4_moe")
    [(found, bias)] = constants(directory).items()
    assert found == name
    assert bias.dtype == torch.float32
    assert bias.any()
    save_policy(saved(directory), directory, tmp_path / "policy")
    assert torch.equal(load_file(tmp_path / "policy/model.safetensors")[name], bias)
    assert constants(save_tiny_model(tmp_path / "llama")) == {}


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_saved_policy_computes_the_same_logits(tmp_path, kind):
    base = save_tiny_kind(tmp_path / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((1.5 * parameter).bfloat16())  # exact in bf16
    tensors = as_saved(model, ((name, parameter.detach) for name, parameter in model.named_parameters()))
    save_policy(dict(tensors), base, tmp_path / "policy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert load_tokenizer(tmp_path / "policy")


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_at_most_one_layer_is_in_memory(tmp_path, kind):
    directory = save_tiny_model(tmp_path) if kind == "llama" else save_tiny_kind(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    alive, peak = [0], 0

    def give(parameter):
        nonlocal peak
        storage = parameter.detach().clone().untyped_storage()
        alive[0] += parameter.numel()
        peak = max(peak, alive[0])
        weakref.finalize(storage, lambda: alive.__setitem__(0, alive[0] - parameter.numel()))
        return torch.empty(0).set_(storage, 0, parameter.shape)

    for _ in as_saved(model, ((name, partial(give, parameter)) for name, parameter in model.named_parameters())):
        pass
    del _
    gc.collect()
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert alive == [0]
    assert peak <= layer + 64 * 64  # plus the tensor that the loop above still holds
    assert peak < sum(parameter.numel() for parameter in model.parameters()) / 1.8
