"""A policy on disk is checked and measured before anything starts."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from common.errors import UserError
from common.model.small_model import small_config
from deploy.policy_files import PolicyFiles
from tests.fakes import save_tiny_model


def test_a_policy_is_checked_and_measured(tmp_path, capsys):
    save_tiny_model(tmp_path)
    capsys.readouterr()
    policy = PolicyFiles.load(str(tmp_path))
    assert (policy.size.vocabulary, policy.size.context) == (64, 128)
    assert capsys.readouterr().err == ""


def test_a_policy_without_an_end_token_is_used_with_a_warning(tmp_path, capsys):
    save_tiny_model(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    (tmp_path / "generation_config.json").unlink()
    PolicyFiles.load(str(tmp_path))
    warning = capsys.readouterr().err
    assert f"warning: model.path ({tmp_path}) has no end token, so every response runs to" in warning
    assert "set eos_token in its tokenizer_config.json" in warning


def test_a_model_that_cannot_be_packed_may_only_generate(tmp_path):
    save_tiny_model(tmp_path)
    AutoModelForCausalLM.from_config(small_config(CONFIG_MAPPING["stablelm"]())).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a stablelm model, cannot be trained"):
        PolicyFiles.load(str(tmp_path))
    PolicyFiles.load(str(tmp_path), packed=False)
