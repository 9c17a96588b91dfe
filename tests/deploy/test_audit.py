"""`ratchet audit` and `ratchet replay` on the directory of a run, or on a copy of it, without Ray and vLLM."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from common.files import sha256
from deploy.audit import run_audit
from deploy.replay import rebuild_credit, run_replay
from deploy.run.directory import sole_owner
from tests.durability.disasters import tree_digest
from tests.durability.small_run import (
    FROM_A_CRITIC,
    NUM_STEPS,
    save_smallest_critic,
    save_smallest_model,
    small_config,
    train_to_the_end,
)
from tests.learner.proof.forge import add_note, forge_checkpoint, forge_step
from tests.learner.proof.test_replay import one_more

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Its arguments are those of `ratchet`. Importing Ray or vLLM fails.
WITHOUT_RAY_AND_VLLM = """
import sys
sys.modules["ray"] = sys.modules["vllm"] = None
from deploy.cli import main
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_smallest_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def honest(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    with sole_owner(directory) as held:
        held.begin(small_config(model, **FROM_A_CRITIC), "train", force=False)
    train_to_the_end(directory, model, **FROM_A_CRITIC)
    return directory


@pytest.fixture
def run(honest, tmp_path):
    return Path(shutil.copytree(honest, tmp_path / "läufe/実行 1"))


def ratchet(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", WITHOUT_RAY_AND_VLLM, *arguments]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_an_audit_with_replay_proves_a_copy_without_ray_and_vllm(run, model, tmp_path):
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere/model"))
    shutil.copytree(save_smallest_critic(model), tmp_path / "elsewhere/critic")
    elsewhere = ("--model", "elsewhere/model", "--critic", "elsewhere/critic")
    before = tree_digest(run)
    done = ratchet("audit", str(run), "--replay", *elsewhere, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        *("rule", "chain", "samples", "versions", "checkpoints", "metrics", "credit", "evaluations", "replay"),
    ]
    assert f"{NUM_STEPS} steps; compared: checkpoint 4, checkpoint 5" in done.stdout
    assert tree_digest(run) == before
    done = ratchet("replay", str(run), "--to-step", "3", "--to", "out", *elsewhere, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"policy after 3 of {NUM_STEPS} steps" in done.stdout
    assert sha256(tmp_path / "out/model.safetensors") in done.stdout
    assert tree_digest(run) == before
    (run / "credit/step-000003.parquet").unlink()
    done = ratchet("replay", str(run), "--credit", "2-3", "--from-checkpoint", "--model", str(moved), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == f"values of the tokens of 2 steps: {run}/credit".split()
    assert tree_digest(run) == before


@pytest.mark.parametrize("steps", ["5", "3-5", "3-2", "", "a", "-1", "1-", "1.5"])
def test_steps_that_the_journal_does_not_have_are_refused(run, tmp_path, steps):
    with pytest.raises(UserError, match=r"^--credit .* must be a step such as 7, .*; the journal has steps 0 to 4$"):
        rebuild_credit(run, steps, to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_replay_needs_something_to_write(run, tmp_path):
    for arguments, fault in (((), "name a new directory"), (("--credit", "1", "--to-step", "2"), "name one of them")):
        done = ratchet("replay", str(run), *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert fault in done.stderr


def test_the_first_violation_is_named_with_exit_code_1(run, tmp_path):
    forge_step(run, 2, lambda table, about: table.slice(1))
    done = ratchet("audit", str(run), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"ratchet: audit of {run} failed: samples: step 2: ")


def test_only_a_replay_finds_weights_that_the_journal_does_not_lead_to(run, capsys):
    forge_checkpoint(run, 4, "weights-00000.safetensors", one_more)
    assert run_audit(run) == 0
    assert run_audit(run, replay=True) == 1
    assert "audit of" in (error := capsys.readouterr().err)
    assert "replay: " in error
    assert "step-000004" in error


def test_every_step_of_a_run_can_be_rebuilt(run, tmp_path, model, capsys):
    """The policy after step s is that of a run which ended there."""
    train_to_the_end(tmp_path / "short", model, num_steps=2, **FROM_A_CRITIC)
    for steps, expected in ((2, tmp_path / "short/policy"), (NUM_STEPS, run / "policy")):
        found = run_replay(run, tmp_path / f"out-{steps}", to_step=steps)
        assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    before, base = (
        load_file(path / "model.safetensors") for path in (run_replay(run, tmp_path / "0", to_step=0), model)
    )
    assert all(torch.equal(before[name], tensor.bfloat16()) for name, tensor in base.items())
    begun = run_replay(run, tmp_path / "again", to_step=NUM_STEPS, from_checkpoint=True)
    assert (begun / "model.safetensors").read_bytes() == (run / "policy/model.safetensors").read_bytes()
    assert "rebuilt from checkpoint step-000005" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_passed_over_and_named(run, tmp_path, capsys):
    weights = run / "checkpoints/step-000005/weights-00000.safetensors"
    weights.write_bytes(one_more(weights.read_bytes()))
    before = tree_digest(run)
    found = run_replay(run, tmp_path / "out", from_checkpoint=True)
    assert (found / "model.safetensors").read_bytes() == (run / "policy/model.safetensors").read_bytes()
    shown = capsys.readouterr()
    assert "step-000005 is skipped: weights-00000.safetensors is damaged" in shown.err
    assert "rebuilt from checkpoint step-000004" in shown.out
    assert tree_digest(run) == before


def test_a_setting_that_changed_is_replayed_from_its_step_on(honest, tmp_path, model, capsys):
    """A run that continues with --change, and its replay."""
    run = tmp_path / "run"
    with sole_owner(run) as held:
        held.begin(small_config(model, num_steps=3, **FROM_A_CRITIC), "train", force=False)
        train_to_the_end(run, model, num_steps=3, **FROM_A_CRITIC)
        add_note(run, 3, "change", settings={"optimizer.learning_rate": 0.05, "kl.coef": 0.5})
        changed = {"optimizer": {"learning_rate": 0.05}, "kl": {"controller": "adaptive", "coef": 0.5}, **FROM_A_CRITIC}
        held.resume(small_config(model, **changed))
        train_to_the_end(run, model, **changed)
    assert run_audit(run, replay=True) == 0, capsys.readouterr().err
    changed_policy, plain = (path / "policy/model.safetensors" for path in (run, honest))
    assert changed_policy.read_bytes() != plain.read_bytes()


def test_a_run_that_cannot_be_replayed_is_refused_with_the_remedy(run, model, tmp_path):
    with pytest.raises(UserError, match=r"is no run directory"):
        run_audit(tmp_path)
    with pytest.raises(UserError, match=r"--to-step \(6\) must be between 0 and 5"):
        run_replay(run, tmp_path / "out", to_step=6)
    with pytest.raises(UserError, match=r"--to .* exists; name a new directory"):
        run_replay(run, run, to_step=1)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    weights = other / "model.safetensors"
    weights.write_bytes(one_more(weights.read_bytes()))
    with pytest.raises(UserError, match=r"--model .* is not the model that the run began with .*name that model"):
        run_replay(run, tmp_path / "out", model=str(other))
    critic = save_smallest_critic(model)
    with pytest.raises(
        UserError, match=r"--critic .*other\) is not the critic that the run began with .* with --critic$"
    ):
        run_replay(run, tmp_path / "out", critic=str(other))
    critic.rename(tmp_path / "moved")
    try:
        with pytest.raises(UserError, match=r"learner.critic_path .* is no directory; name .* with --critic$"):
            run_replay(run, tmp_path / "out")
    finally:
        (tmp_path / "moved").rename(critic)
    with pytest.raises(UserError, match=r"ppo.clip_eps=0.3"):
        run_replay(run, tmp_path / "out", settings=["ppo.clip_eps=0.3"])
    assert not (tmp_path / "out").exists()
