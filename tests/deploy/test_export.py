"""The policy of an interrupted run, from its newest checkpoint: what the run itself would have written there."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.errors import UserError
from deploy.export import run_export
from deploy.run.directory import sole_owner
from learner.ppo.learner import Learner
from tests.fakes import save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import varied_batch

KINDS = {
    "shared": {},
    "separate": {"critic": "separate", "gradient_checkpointing": True},
    "lora": {"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("modèle 模型"))


@pytest.fixture(params=KINDS)
def interrupted(request, model, tmp_path):
    """A run with checkpoints after one and two steps of 3, and what the policy was then."""
    cfg = tiny_config(model, rollouts_per_step=8, learner={"precision": "fp32", **KINDS[request.param]})
    run = tmp_path / "läufe/実行 1"
    with sole_owner(run) as held:
        held.begin(cfg, "train", force=False)
    learner = Learner(cfg)
    for step in (1, 2):
        learner.update(varied_batch(step))
        learner.save(run / f"checkpoints/step-{step:06d}")
    (run / "checkpoints/step-000003").mkdir()  # cut short: without its marker
    learner.save_policy(tmp_path / "written/policy")
    return run, tmp_path / "written", request.param


def contents(directory, *, but=None):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not (but and path.is_relative_to(but))
    }


def test_an_interrupted_run_gives_the_policy_of_its_newest_checkpoint(interrupted, model, capsys, monkeypatch):
    run, written, kind = interrupted
    before = contents(run)
    monkeypatch.chdir("/")
    target = run_export(run)
    assert target == run / "exported/step-000002"
    assert contents(run, but=target) == before
    found, expected = contents(target), contents(written / "policy")
    assert {name: file for name, file in found.items() if not name.startswith("adapter")} == expected
    trained, base = (load_file(path / "model.safetensors") for path in (target, model))
    assert any(not torch.equal(trained[name], base[name].bfloat16()) for name in base)
    assert "policy after 2 of 3 steps" in capsys.readouterr().out
    adapters = {name.removeprefix("adapter/"): file for name, file in found.items() if name.startswith("adapter")}
    assert adapters == (contents(written / "adapter") if kind == "lora" else {})
    AutoModelForCausalLM.from_pretrained(target)
    assert run_export(run) == target  # again, in place of what it wrote before


def test_an_export_never_overwrites_a_directory(interrupted, tmp_path):
    run, written, _ = interrupted
    before = contents(run)
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "new/策略", tmp_path / "empty"):
        assert run_export(run, target) == target
        assert (target / "model.safetensors").read_bytes() == (written / "policy/model.safetensors").read_bytes()
        with pytest.raises(UserError, match=r"--to .* exists; name a new directory"):
            run_export(run, target)
    assert contents(run) == before


def test_a_run_that_cannot_be_exported_is_refused_with_the_remedy(model, tmp_path):
    with pytest.raises(UserError, match=r"is no run directory"):
        run_export(tmp_path)
    with sole_owner(tmp_path / "run") as held:
        held.begin(tiny_config(model), "train", force=False)
    with pytest.raises(UserError, match=r"has no complete checkpoint.*every 20 steps.*--resume"):
        run_export(tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    with pytest.raises(UserError, match=r"step-000001 cannot be read \("):
        run_export(tmp_path / "run")
    record = tmp_path / "run/run.json"
    os.rename(record, record.with_name("old"))
    record.write_text(json.dumps({"ratchet_run": 1, "command": "train-reward"}))
    with pytest.raises(UserError, match=r"was made by ratchet train-reward"):
        run_export(tmp_path / "run")
