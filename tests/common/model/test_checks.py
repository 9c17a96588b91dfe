"""Each fault in the files of a model is one UserError that names its cause, before anything starts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from common.errors import UserError
from common.model.files import (
    check_policy_files,
    check_trainable_kind,
    end_token_ids,
    load_policy,
    load_tokenizer,
    resolve_model,
)
from common.model.size import model_size
from common.model.small_model import random_model, small_config
from tests.common.model.model_kinds import tiny_config
from tests.fakes import save_tiny_model


@pytest.fixture
def directory(tmp_path):
    return save_tiny_model(tmp_path / "model")


def change_config(directory, **changes):
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def check(directory):
    """The checks that the driver makes before it starts anything."""
    resolve_model(str(directory))
    model_size(directory)
    check_policy_files(directory)
    check_trainable_kind(directory)
    end_token_ids(directory, load_tokenizer(directory), 64)


def refusal(directory) -> str:
    with pytest.raises(UserError) as caught:
        check(directory)
    message = str(caught.value)
    assert message.startswith(f"model.path ({directory})")
    assert "\n" not in message
    return message


def test_a_sound_model_passes(directory):
    check(directory)


# Odd configs

ODD = {
    "no heads": {"num_attention_heads": 0},
    "heads in words": {"num_attention_heads": "x"},
    "negative context": {"max_position_embeddings": -5},
    "no context": {"max_position_embeddings": None},
    "endless vocabulary": {"vocab_size": 10**12},
    "vocabulary in words": {"vocab_size": "many"},
    "unknown activation": {"hidden_act": "no_such_activation"},
    "rope without factor": {"rope_parameters": {"rope_type": "linear"}},
    "unknown rope": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
    "rope is a list": {"rope_parameters": [1]},
    "odd head size": {"head_dim": 31},
    "layers in words": {"num_hidden_layers": "two"},
    "fewer layers than files": {"num_hidden_layers": 1},
    "more layers than files": {"num_hidden_layers": 3},
    "negative layers": {"num_hidden_layers": -1},
    "hidden size of another model": {"hidden_size": 128},
    "hidden size null": {"hidden_size": None},
    "keys that do not divide": {"num_key_value_heads": 3},
    "type is a number": {"model_type": 7},
    "padding beyond the vocabulary": {"pad_token_id": 64},
    "unknown dtype": {"dtype": "float7"},
    "type of a vision model": {"model_type": "vit"},
    "type of an encoder and decoder": {"model_type": "t5"},
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_an_odd_config_is_refused(directory, changes):
    change_config(directory, **changes)
    refusal(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '"llama"', "{}", "\0"])
def test_a_file_without_a_config_is_refused(directory, text):
    (directory / "config.json").write_text(text)
    refusal(directory)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": "1.0"}'])
def test_a_tokenizer_that_cannot_be_read_is_refused(directory, text):
    (directory / "tokenizer.json").write_text(text)
    assert "tokenizer cannot be loaded" in refusal(directory)


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": {}}'])
def test_a_generation_config_that_cannot_be_read_is_refused(directory, text):
    (directory / "generation_config.json").write_text(text)
    refusal(directory)


def test_a_quantised_model_is_refused_with_its_method_and_a_remedy(directory):
    change_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(directory)
    assert "its weights are quantised (gptq) and cannot be trained; name the original model in bfloat16" in message


# Code from the directory


def add_code(directory, monkeypatch):
    ran = directory.parent / "ran"
    (directory / "configuration_own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
    )
    change_config(directory, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    return ran


def test_code_from_the_directory_is_refused_and_does_not_run(directory, monkeypatch):
    ran = add_code(directory, monkeypatch)
    assert "set model.trust_remote_code = true if you trust that code" in refusal(directory)
    assert not ran.exists()


def test_code_from_the_directory_runs_if_the_config_allows_it(directory, monkeypatch):
    ran = add_code(directory, monkeypatch)
    assert resolve_model(str(directory), trust_remote_code=True) == directory
    with pytest.raises(UserError, match="Unrecognized configuration class"):  # it has no model class
        model_size(directory)
    assert ran.exists()


# Weights


def saved_without(directory, *names, **added):
    model = AutoModelForCausalLM.from_pretrained(directory)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(names or ("-",))}
    model.save_pretrained(directory, state_dict={**weights, **added})


def test_missing_weights_are_named(directory):
    saved_without(directory, "model.layers.1.mlp.")
    assert "model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight" in refusal(directory)


def test_weights_that_the_config_does_not_know_are_named(directory):
    saved_without(directory, **{"model.layers.2.extra": torch.ones(1)})
    assert "has no place for (model.layers.2.extra)" in refusal(directory)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(directory, bad):
    weight = torch.zeros(64, 128)
    weight[3, 5] = bad
    saved_without(directory, **{"model.layers.0.mlp.down_proj.weight": weight})
    assert "its weight model.layers.0.mlp.down_proj.weight has numbers that are not finite" in refusal(directory)


def test_large_finite_weights_are_accepted(directory):
    """Their sum overflows, but each one is finite."""
    saved_without(directory, **{"model.norm.weight": torch.full((64,), 1e38)})
    check_policy_files(directory)


def test_truncated_files_are_refused(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refusal(directory)


def test_weights_in_pytorch_files_are_compared_too(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    weights = model.state_dict()
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    check(directory)
    del weights["model.norm.weight"]
    torch.save(weights, directory / "pytorch_model.bin")
    assert "model.norm.weight is not in its files" in refusal(directory)


# Tokens


def test_an_end_token_beyond_the_embedding_is_refused(directory):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 64]}))
    assert "uses the token 64" in refusal(directory)
    assert "its embedding has 64 rows; resize it with resize_token_embeddings" in refusal(directory)


# Types of models


@pytest.mark.parametrize("kind", ["stablelm", "falcon_mamba", "gptj", "bloom", "doge"])
def test_a_type_that_cannot_be_packed_is_refused_without_weights(tmp_path, kind):
    small_config(CONFIG_MAPPING[kind]()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"a {kind} model, cannot be trained: .*; docs/models.md lists what is supp"):
        check_trainable_kind(tmp_path)


def test_a_model_in_half_precision_is_accepted(directory):
    AutoModelForCausalLM.from_pretrained(directory).half().save_pretrained(directory)
    check(directory)
    load_policy(directory, dtype=torch.float32, device=torch.device("cpu"))


def test_a_type_that_reads_images_is_refused(tmp_path):
    save_tiny_model(tmp_path)
    random_model(tiny_config("gemma3")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its type also reads images, and the generators cannot start vLLM with such a"):
        check_policy_files(tmp_path)
