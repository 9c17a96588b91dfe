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
from learner.loop.checkpoints import Checkpoints
from learner.loop.journal import Journal
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
    learner, journal = Learner(cfg), Journal(run / "journal")
    journal.open_for_writing()
    for step in (1, 2):
        journal.append(varied_batch(step), policy_version=step - 1, prompts={})
        learner.update(varied_batch(step))
        Checkpoints(run / "checkpoints", every=1, keep=9, journal=journal).complete(
            step, learner.save(run / f"checkpoints/step-{step:06d}")
        )
    record = {
        "policy_version": 2,
        "prompts": 7,
        "score": 0.5,
        "pass_at_1": None,
        "kl_per_response": 1,
        "response_tokens": 8,
    }
    (run / "evaluations.jsonl").write_text(json.dumps(record) + "\n")
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
    card = found.pop("README.md").decode()
    assert {name: file for name, file in found.items() if not name.startswith("adapter")} == expected
    assert "after 2 of 3 steps of PPO" in card
    assert "| after 2 steps |" in card
    assert "each of 7 prompts" in card
    assert str(model) not in card
    trained, base = (load_file(path / "model.safetensors") for path in (target, model))
    assert any(not torch.equal(trained[name], base[name].bfloat16()) for name in base)
    assert "policy after 2 of 3 steps" in capsys.readouterr().out
    adapters = {name.removeprefix("adapter/"): file for name, file in found.items() if name.startswith("adapter")}
    assert adapters == (contents(written / "adapter") if kind == "lora" else {})
    AutoModelForCausalLM.from_pretrained(target)
    assert run_export(run) == target  # again, in place of what it wrote before


def test_an_export_needs_no_trained_critic(interrupted):
    """The one that the run began with may be gone."""
    run, written, _ = interrupted
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("[learner]\n", '[learner]\ncritic_path = "/gone"\n'))
    assert (run_export(run) / "model.safetensors").read_bytes() == (written / "policy/model.safetensors").read_bytes()


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


def test_any_step_with_a_checkpoint_can_be_exported(interrupted, tmp_path):
    run, written, _ = interrupted
    with pytest.raises(UserError, match=r"--step \(3\) must be a step with a checkpoint in .*: 1, 2"):
        run_export(run, step=3)
    first = run_export(run, step=1)
    assert first == run / "exported/step-000001"
    assert (first / "model.safetensors").read_bytes() != (written / "policy/model.safetensors").read_bytes()
    assert "after 1 of 3 steps" in (first / "README.md").read_text()


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(interrupted, capsys):
    run, _, _ = interrupted
    weights = run / "checkpoints/step-000002/weights-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step-000002 cannot be used: weights-00000.safetensors is damaged"):
        run_export(run, step=2)
    assert run_export(run) == run / "exported/step-000001"
    assert "an earlier checkpoint is exported" in capsys.readouterr().err
    assert weights.exists()


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
    with pytest.raises(UserError, match=r"step-000001 cannot be used: its COMPLETE cannot be read"):
        run_export(tmp_path / "run")
    record = tmp_path / "run/run.json"
    os.rename(record, record.with_name("old"))
    record.write_text(json.dumps({"ratchet_run": 1, "command": "train-reward"}))
    with pytest.raises(UserError, match=r"was made by ratchet train-reward"):
        run_export(tmp_path / "run")
