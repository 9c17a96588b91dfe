"""Sharded checkpoints: their contents, reading on any number of ranks, and crashes while writing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import traceback
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from common.errors import UserError
from learner.loop.checkpoints import COMPLETE, Checkpoints
from learner.ppo.learner import Learner
from learner.ranks import checkpoint
from learner.ranks.checkpoint import load_checkpoint, save_checkpoint
from learner.ranks.distributed import whole
from tests.fakes import make_prompt, make_rollout, save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import varied_batch
from tests.learner.ranks.test_distributed import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LORA = {"lora": {"rank": 4}}
KINDS: dict[str, dict[str, Any]] = {"all-weights": {"critic": "separate"}, "lora": LORA}


def new_learner(model: Path, kind: str) -> Learner:
    # Such an eps keeps the size of the gradient in Adam's step, which otherwise almost cancels.
    rates = {"learning_rate": 4e-3, "value_head_learning_rate": 2e-2, "critic_learning_rate": 8e-3, "eps": 1e-3}
    cfg = tiny_config(
        model,
        rollouts_per_step=8,
        num_steps=10,
        kl={"controller": "adaptive", "horizon": 20},
        optimizer={**rates, "schedule": "linear", "weight_decay": 0.1},
        learner={"precision": "fp32", "timeout_s": 30, **KINDS[kind]},
    )
    return Learner(cfg)


def state(learner: Learner) -> dict[str, Any]:
    """Every weight and its moments, in full, and the learner's numbers."""
    named = {id(p): name for name, p in learner.network.named_parameters()}
    moments = {
        (named[id(p)], key): whole(value).clone()
        for p, of_p in learner.optimizer.state.items()
        for key, value in of_p.items()
    }
    return {
        "weights": {name: whole(p).clone() for name, p in learner.network.named_parameters()},
        "moments": moments,
        "numbers": (learner.step, learner.kl_controller.coef, learner.score_moments),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in learner.optimizer.param_groups],
    }


def update(learner: Learner, seed: int) -> dict[str, float]:
    return {k: v for k, v in learner.update(varied_batch(seed)).items() if not k.startswith("time/")}


def continued(learner: Learner) -> dict[str, Any]:
    """Two more updates, and where they lead."""
    return {"at": state(learner), "stats": [update(learner, seed) for seed in (1, 2)], "then": state(learner)}


def uninterrupted(learner: Learner, directory: Path) -> dict[str, Any]:
    """An update, a checkpoint of it in `directory`, and two more."""
    update(learner, 0)
    if learner.cfg.learner.lora:
        # A pass without gradients may come between, and leaves layers gathered.
        learner.ref_logprobs(make_rollout(make_prompt(), [4, 5]))
    learner.save(directory)
    return continued(learner)


def restored(learner: Learner, directory: Path) -> dict[str, Any]:
    for seed in (5, 6):  # moments and numbers that must not stay
        update(learner, seed)
    assert learner.restore(directory) == 1
    return continued(learner)


def rank_process(rank: int, ready: Barrier, directory: Path, model: Path) -> None:
    """One rank's process: continues from checkpoints of two ranks and of one."""
    ready.wait()
    for kind in KINDS:
        for name in ("two", "two-two", "one-two"):
            learner = new_learner(model, kind)
            learner.join(rank, 2, f"file://{directory}/{kind}-{name}")
            source = directory / kind / name.split("-")[0]
            result = uninterrupted(learner, source) if name == "two" else restored(learner, source)
            if rank == 0:
                torch.save(result, directory / f"{kind}-{name}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """A directory with the checkpoints KIND/one and KIND/two, and how runs went on: one and two are uninterrupted, A-B
    was written on A ranks and restored on B."""
    directory = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for kind in KINDS:
        found[kind, "one"] = uninterrupted(new_learner(model, kind), directory / kind / "one")
        found[kind, "one-one"] = restored(new_learner(model, kind), directory / kind / "one")
    run_ranks(rank_process, directory, model)
    for kind in KINDS:
        found[kind, "two-one"] = restored(new_learner(model, kind), directory / kind / "two")
        for name in ("two", "two-two", "one-two"):
            found[kind, name] = torch.load(directory / f"{kind}-{name}.pt", weights_only=False)
    return directory, found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit."""
    for part in ("weights", "moments"):
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(found[part][key], tensor) for key, tensor in expected[part].items())
    assert found["numbers"] == expected["numbers"]
    assert found["groups"] == expected["groups"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["one-one", "two-two", "one-two", "two-one"])
def test_a_checkpoint_restores_every_bit_on_any_number_of_ranks(runs, kind, how):
    found, written = runs[1][kind, how], runs[1][kind, how.split("-")[0]]
    assert_same(found["at"], written["at"])
    moments = written["at"]["moments"]
    assert {key for _, key in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(moments) == 3 * sum(kind != "lora" or "lora_" in n or "value_head" in n for n in found["at"]["weights"])
    assert sum(bool(value.abs().max() > 0) for value in moments.values()) > 0.9 * len(moments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["one-one", "two-two"])
def test_a_restored_learner_continues_bit_for_bit_on_as_many_ranks(runs, kind, how):
    found, expected = runs[1][kind, how], runs[1][kind, how.split("-")[0]]
    assert found["stats"] == expected["stats"]
    assert_same(found["then"], expected["then"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["one-two", "two-one"])
def test_a_restored_learner_continues_alike_on_other_numbers_of_ranks(runs, kind, how):
    """To 1e-5 in metrics; in weights, which these two updates move by up to 1e-2, to 1e-6."""
    found, expected = runs[1][kind, how], runs[1][kind, how.split("-")[0]]
    for stats, others in zip(found["stats"], expected["stats"], strict=True):
        assert stats == pytest.approx(others, rel=1e-5, abs=1e-6)
    for part, atol in (("weights", 1e-6), ("moments", 1e-5)):
        for key, tensor in expected["then"][part].items():
            torch.testing.assert_close(found["then"][part][key], tensor, rtol=1e-4, atol=atol)
    moved = [(expected["then"]["weights"][k] - w).abs().max() for k, w in expected["at"]["weights"].items()]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_a_checkpoint_holds_what_is_trained_and_nothing_frozen(runs, ranks):
    for kind in KINDS:
        names = FileSystemReader(runs[0] / kind / ranks).read_metadata().state_dict_metadata
        weights = {name.removeprefix("network.") for name in names if name.startswith("network.")}
        trained = {name for name, _ in runs[1][kind, ranks]["at"]["moments"]}
        assert weights - {"policy.lm_head.weight"} == trained  # the embedding by its other name
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert {name for name in names if name.endswith(f".{moment}")} == {
                f"optimizer.state.{name}.{moment}" for name in trained
            }
    size = {kind: sum(f.stat().st_size for f in (runs[0] / kind / ranks).iterdir()) for kind in KINDS}
    assert size["lora"] < size["all-weights"] / 4


def test_every_rank_writes_its_share(runs):
    shares = sorted((runs[0] / "all-weights/two").glob("*.distcp"))
    assert len(shares) == 2
    assert shares[0].stat().st_size == pytest.approx(shares[1].stat().st_size, rel=0.4)


# Crashes


@pytest.fixture
def trained():
    """A small network, its optimizer, and a step behind them."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return network, optimizer


NUMBERS = {
    "third": 1 / 3, "tenth": 0.1, "tiny": 5e-324, "large": 1.7976931348623157e308, "next": 1 + 2**-52,
    "many": 2**63 + 1, "nested": {"mean": -0.1234567890123456789, "count": 12}, "list": [1e-7, 3],
}  # fmt: skip


def test_numbers_come_back_exactly(trained, tmp_path):
    save_checkpoint(tmp_path / "step-000001", *trained, NUMBERS)
    found = load_checkpoint(tmp_path / "step-000001", *trained)
    assert found == NUMBERS
    assert repr(found) == repr(NUMBERS)


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), errno.ENOSPC),
        (OSError(errno.EACCES, "Permission denied"), errno.EACCES),
        (RuntimeError("something else"), None),
    ],
)
def test_a_checkpoint_that_cannot_be_written_says_why(trained, tmp_path, monkeypatch, cause, kind):
    def failing(*args: Any, **kwargs: Any) -> None:
        raise CheckpointException("save", {0: (cause, traceback.StackSummary())})

    monkeypatch.setattr(checkpoint.dcp, "save", failing)
    with pytest.raises((OSError, RuntimeError)) as raised:
        save_checkpoint(tmp_path / "c", *trained, {})
    assert getattr(raised.value, "errno", None) == kind
    assert not (tmp_path / "c/COMPLETE").exists()


def test_a_checkpoint_takes_the_place_of_what_lay_there(trained, tmp_path):
    directory = tmp_path / "step-000001"
    save_checkpoint(directory, *trained, {"step": 1})
    (directory / "left over").touch()
    with torch.no_grad():
        trained[0].weight.fill_(2.0)
    save_checkpoint(directory, *trained, {"step": 2})
    assert not (directory / "left over").exists()
    with torch.no_grad():
        trained[0].weight.fill_(3.0)
    assert load_checkpoint(directory, *trained) == {"step": 2}
    assert torch.equal(trained[0].weight, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("where", ["shutil.rmtree", "get_state_dict", "dcp.save", "json.dump"])
def test_a_crash_while_writing_leaves_nothing_that_is_loaded(trained, tmp_path, monkeypatch, where):
    """Also where a complete one of the same name was to be replaced."""
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    save_checkpoint(checkpoints.path(1), *trained, {"step": 1})
    if where == "shutil.rmtree":
        save_checkpoint(checkpoints.path(2), *trained, {"step": 2})

    def crash(*_: Any, **__: Any) -> None:
        if where == "shutil.rmtree":
            next(checkpoints.path(2).glob("*.distcp")).unlink()
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(f"learner.ranks.checkpoint.{where}", crash)
        with pytest.raises(OSError, match="the disk is full"):
            save_checkpoint(checkpoints.path(2), *trained, {"step": 2})
    assert checkpoints.newest() == checkpoints.path(1)
    assert load_checkpoint(checkpoints.newest(), *trained) == {"step": 1}
    checkpoints.prune()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from learner.loop.checkpoints import Checkpoints
from learner.ranks import checkpoint
network = torch.nn.Linear(3, 2)
optimizer = torch.optim.AdamW(network.parameters())
checkpoints = Checkpoints(Path(sys.argv[1]), every=1, keep=2)
checkpoint.save_checkpoint(checkpoints.path(1), network, optimizer, {"step": 1})
write = checkpoint.dcp.save
def save(*args, **kwargs):
    write(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.dcp.save = save
checkpoint.save_checkpoint(checkpoints.path(2), network, optimizer, {"step": 2})
"""


def test_a_process_killed_before_the_marker_leaves_the_older_checkpoint(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    assert checkpoints.path(2).exists()
    assert checkpoints.newest() == checkpoints.path(1)


def test_the_marker_is_the_last_thing_written(trained, tmp_path, monkeypatch):
    directory, seen = tmp_path / "step-000001", []
    touch = Path.touch

    def note(path: Path, *args: Any) -> None:
        seen.append({p.name for p in directory.iterdir()})
        assert json.loads((directory / "numbers.json").read_text()) == {"step": 1}
        touch(path, *args)

    monkeypatch.setattr(Path, "touch", note)
    save_checkpoint(directory, *trained, {"step": 1})
    assert len(seen) == 1
    assert {p.name for p in directory.iterdir()} - seen[0] == {COMPLETE}


def test_an_incomplete_checkpoint_is_passed_over_and_pruned(trained, tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    assert checkpoints.newest() is None
    for step in range(1, 5):
        save_checkpoint(checkpoints.path(step), *trained, {"step": step})
    (checkpoints.path(4) / "COMPLETE").unlink()
    assert checkpoints.newest() == checkpoints.path(3)
    checkpoints.prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("fault", ["another network", "a damaged file"])
def test_a_checkpoint_that_cannot_be_read_is_the_users_to_fix(trained, tmp_path, fault):
    """torch raises a BaseException, which would end the rank's process without a message."""
    directory = tmp_path / "step-000001"
    save_checkpoint(directory, *trained, NUMBERS)
    network, optimizer = trained
    if fault == "another network":
        network.value_head = nn.Linear(3, 1)
    else:
        next(directory.glob("*.distcp")).write_bytes(b"cut short")
    with pytest.raises(UserError, match=rf"^checkpoint {directory} cannot be read \([^\n]+\); restore it") as raised:
        load_checkpoint(directory, network, optimizer)
    assert ("network.value_head" in str(raised.value)) == (fault == "another network")
