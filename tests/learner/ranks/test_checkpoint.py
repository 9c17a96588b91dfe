"""Sharded checkpoints: their contents, reading on any number of ranks, and crashes while writing."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from common.errors import BatchError, UserError
from common.files import sha256
from learner.loop.checkpoints import COMPLETE, CheckpointError, Checkpoints
from learner.ppo.learner import Learner
from learner.ranks.checkpoint import load_checkpoint, load_network, save_checkpoint
from learner.ranks.distributed import whole
from tests.fakes import make_prompt, make_rollout, save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import varied_batch
from tests.learner.ranks.test_distributed import run_ranks
from tests.saving import mark, save_checkpoint_of

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
        "numbers": (learner.step, learner.kl_controller.coef, replace(learner.score_moments)),
        # Their rates are set at the beginning of each step.
        "groups": [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in learner.optimizer.param_groups],
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
    save_checkpoint_of(learner, directory)
    return continued(learner)


def restored(learner: Learner, directory: Path) -> dict[str, Any]:
    for seed in (5, 6):  # moments and numbers that must not stay
        update(learner, seed)
    assert learner.restore(directory) == 1
    return continued(learner)


def poisoned_tables() -> dict[str, pa.Table]:
    """A total that is not finite, and a loss that is not finite in one row: only one rank computes it."""
    table = varied_batch(3)
    scores, logprobs = table["score"].to_pylist(), table["ref_logprobs"].to_pylist()
    scores[0], logprobs[-1][0] = math.inf, math.nan
    return {
        "a total score, as float32,": table.set_column(*column(table, "score", scores)),
        "the loss": table.set_column(*column(table, "ref_logprobs", logprobs)),
    }


def column(table: pa.Table, name: str, values: list[Any]) -> tuple[int, pa.Field, pa.Array]:
    index = table.schema.get_field_index(name)
    return index, table.schema.field(name), pa.array(values, table.schema.field(name).type)


def after_poison(learner: Learner, directory: Path) -> dict[str, dict[str, Any]]:
    """Each poisoned batch by what is wrong with it, and the state that is restored after it."""
    found = {}
    for what, table in poisoned_tables().items():
        with pytest.raises(BatchError, match=f"{what} is not finite"):
            learner.update(table)
        learner.restore(directory)
        found[what] = state(learner)
    return found


def rank_process(rank: int, ready: Barrier, directory: Path, model: Path) -> None:
    """One rank's process: continues from checkpoints of two ranks and of one."""
    ready.wait()
    for kind in KINDS:
        for name in ("two", "two-two", "one-two"):
            learner = new_learner(model, kind)
            learner.join(rank, 2, f"file://{directory}/{kind}-{name}")
            source = directory / kind / name.split("-")[0]
            result = uninterrupted(learner, source) if name == "two" else restored(learner, source)
            if name == "two-two":
                result["after poison"] = after_poison(learner, source)
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


def shares(directory: Path, kind: str) -> dict[str, list[tuple[list[int], list[int], list[int]]]]:
    """By name of a tensor: shape of the whole, and offset and size of each share in the files."""
    found: dict[str, list[Any]] = {}
    for path in sorted(directory.glob(f"{kind}-*.safetensors")):
        with safe_open(path, "pt") as file:
            places = json.loads(file.metadata()["ratchet"])
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                part = places[name]
                found.setdefault(name, []).append((part["shape"], part["offset"], file.get_slice(name).get_shape()))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["a total score, as float32,", "the loss"])
def test_every_rank_refuses_a_poison_batch_and_can_be_restored(runs, kind, what):
    assert_same(runs[1][kind, "two-two"]["after poison"][what], runs[1][kind, "two"]["at"])


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_a_checkpoint_holds_what_is_trained_and_nothing_frozen(runs, ranks):
    for kind in KINDS:
        trained = {name for name, _ in runs[1][kind, ranks]["at"]["moments"]}
        weights, moments = (shares(runs[0] / kind / ranks, part) for part in ("weights", "optimizer"))
        assert weights.keys() == trained  # the embedding, which is tied, by one of its names
        keys = ("exp_avg", "exp_avg_sq", "step")
        assert moments.keys() == {f"{name}.{key}" for name in trained for key in keys}
    size = {kind: sum(f.stat().st_size for f in (runs[0] / kind / ranks).iterdir()) for kind in KINDS}
    assert size["lora"] < size["all-weights"] / 4


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_write_every_value_once(runs, kind):
    for part in ("weights", "optimizer"):
        for name, found in shares(runs[0] / kind / "two", part).items():
            whole_shape = found[0][0]
            rows = (
                [row for _, offset, size in found for row in range(offset[0], offset[0] + size[0])]
                if whole_shape
                else [0]
            )
            assert rows == list(range(whole_shape[0] if whole_shape else 1)), name
            assert all(shape == whole_shape and size[1:] == shape[1:] for shape, _, size in found)
    sizes = [path.stat().st_size for path in sorted((runs[0] / kind / "two").glob("weights-*"))]
    assert len(sizes) == 2
    assert kind == "lora" or sizes[0] == pytest.approx(sizes[1], rel=0.4)


def test_every_file_has_the_hash_that_its_rank_computed(runs):
    for name in ("one", "two"):
        directory = runs[0] / "all-weights" / name
        files = json.loads((directory / COMPLETE).read_text())["files"]
        assert files == {path.name: sha256(path) for path in directory.iterdir() if path.name != COMPLETE}


def test_an_optimizer_that_has_not_begun_with_some_weights_is_restored_so(model, tmp_path):
    """In warm-up steps the policy gets no gradient, so Adam has no moments for it."""
    overrides: dict[str, Any] = {"rollouts_per_step": 8, "num_steps": 10, "ppo": {"ppo_epochs": 1}}
    cfg = tiny_config(model, **overrides, learner={"precision": "fp32", "critic_warmup_steps": 2})
    whole_run, resumed = Learner(cfg), Learner(cfg)
    update(whole_run, 0)
    save_checkpoint_of(whole_run, tmp_path / "step-000001")
    assert resumed.restore(tmp_path / "step-000001") == 1
    assert_same(state(resumed), state(whole_run))
    assert {name.split(".")[0] for name, _ in state(resumed)["moments"]} == {"value_head"}
    for seed in (1, 2):
        assert update(resumed, seed) == update(whole_run, seed)
    assert_same(state(resumed), state(whole_run))


def test_a_checkpoint_before_the_first_optimizer_step_changes_nothing(model, tmp_path):
    """Such as after a first batch that was void. torch's own function would have Adam count a step."""
    saved, plain, resumed = (new_learner(model, "all-weights") for _ in range(3))
    for learner in (saved, plain):
        learner.skip()
    save_checkpoint_of(saved, tmp_path / "step-000001")
    assert resumed.restore(tmp_path / "step-000001") == 1
    for learner in (saved, plain, resumed):
        update(learner, 1)
    assert_same(state(saved), state(plain))
    assert_same(state(resumed), state(plain))


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


def save_marked(directory: Path, network: nn.Module, optimizer: torch.optim.Optimizer, numbers: dict[str, Any]) -> None:
    mark(directory, save_checkpoint(directory, network, optimizer, numbers), numbers.get("step", 1))


NUMBERS = {
    "third": 1 / 3, "tenth": 0.1, "tiny": 5e-324, "large": 1.7976931348623157e308, "next": 1 + 2**-52,
    "many": 2**63 + 1, "nested": {"mean": -0.1234567890123456789, "count": 12}, "list": [1e-7, 3],
}  # fmt: skip


def test_numbers_come_back_exactly(trained, tmp_path):
    save_marked(tmp_path / "step-000001", *trained, NUMBERS)
    found = load_checkpoint(tmp_path / "step-000001", *trained)
    assert found == NUMBERS
    assert repr(found) == repr(NUMBERS)


def test_other_programs_read_the_tensors(trained, tmp_path):
    """With the safetensors library alone; and values that are not numbers come back with every bit."""
    network, optimizer = trained
    with torch.no_grad():
        network.weight[0] = torch.tensor([math.nan, math.inf, -0.0])
    save_marked(tmp_path / "c", network, optimizer, {})
    with safe_open(tmp_path / "c/weights-00000.safetensors", "pt") as file:
        found = file.get_tensor("weight")
    assert torch.equal(found.view(torch.int32), network.weight.detach().view(torch.int32))


def test_a_full_disk_is_an_error_that_says_so(trained, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        save_checkpoint(tmp_path / "c", *trained, {})
    assert raised.value.errno == errno.ENOSPC
    assert not (tmp_path / "c/COMPLETE").exists()


def test_a_checkpoint_takes_the_place_of_what_lay_there(trained, tmp_path):
    directory = tmp_path / "step-000001"
    save_marked(directory, *trained, {"step": 1})
    (directory / "left over").touch()
    with torch.no_grad():
        trained[0].weight.fill_(2.0)
    save_marked(directory, *trained, {"step": 2})
    assert not (directory / "left over").exists()
    with torch.no_grad():
        trained[0].weight.fill_(3.0)
    assert load_checkpoint(directory, *trained) == {"step": 2}
    assert torch.equal(trained[0].weight, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("where", ["shutil.rmtree", "get_state_dict", "os.fsync", "json.dumps"])
def test_a_crash_while_writing_leaves_nothing_that_is_loaded(trained, tmp_path, monkeypatch, where):
    """Also where a complete one of the same name was to be replaced."""
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    save_marked(checkpoints.path(1), *trained, {"step": 1})
    if where == "shutil.rmtree":
        save_marked(checkpoints.path(2), *trained, {"step": 2})

    def crash(*_: Any, **__: Any) -> None:
        if where == "shutil.rmtree":
            next(checkpoints.path(2).glob("*.safetensors")).unlink()
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(f"learner.ranks.checkpoint.{where}", crash)
        with pytest.raises(OSError, match="the disk is full"):
            save_checkpoint(checkpoints.path(2), *trained, {"step": 2})
    assert checkpoints.steps() == [1]
    assert load_checkpoint(checkpoints.path(1), *trained) == {"step": 1}
    checkpoints.prune()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from learner.loop.checkpoints import Checkpoints
from learner.ranks.checkpoint import save_checkpoint
network = torch.nn.Linear(3, 2)
optimizer = torch.optim.AdamW(network.parameters())
checkpoints = Checkpoints(Path(sys.argv[1]), every=1, keep=2)
checkpoints.complete(1, save_checkpoint(checkpoints.path(1), network, optimizer, {"step": 1}))
save_checkpoint(checkpoints.path(2), network, optimizer, {"step": 2})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_before_the_marker_leaves_the_older_checkpoint(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    assert checkpoints.path(2).exists()
    assert checkpoints.steps() == [1]
    checkpoints.check(1)


@pytest.mark.parametrize("fault", ["another network", "a shorter tensor", "a damaged file", "no marker"])
def test_a_checkpoint_that_cannot_be_read_is_refused_by_name(trained, tmp_path, fault):
    directory = tmp_path / "step-000001"
    save_marked(directory, *trained, NUMBERS)
    network, optimizer = trained
    reason = r"cannot be read \("
    if fault == "another network":
        network.value_head = nn.Linear(3, 1)
        reason += "it does not have all of value_head"
    elif fault == "a shorter tensor":
        network = nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(network.parameters())
        reason += r"ValueError: a tensor of shape \[2\] cannot fill one of shape \[3\]|.*shape \[2, 3\]"
    elif fault == "a damaged file":
        next(directory.glob("weights-*")).write_bytes(b"cut short")
    else:
        (directory / COMPLETE).unlink()
    with pytest.raises(UserError, match=rf"^checkpoint {directory} {reason}"):
        load_checkpoint(directory, network, optimizer)


class Planted:
    """Its pickle would make a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("name", ["weights-00000.safetensors", "numbers.json", COMPLETE, ".metadata", "x.distcp"])
def test_no_file_of_a_checkpoint_can_run_code(trained, tmp_path, name):
    directory = tmp_path / "step-000001"
    save_marked(directory, *trained, NUMBERS)
    (directory / name).write_bytes(pickle.dumps(Planted(tmp_path / "it ran")))
    with contextlib.suppress(UserError):
        load_checkpoint(directory, *trained)
    with contextlib.suppress(UserError):
        load_network(directory, trained[0])
    with contextlib.suppress(CheckpointError):
        Checkpoints(tmp_path, every=1, keep=1).check(1)
    assert not (tmp_path / "it ran").exists()
