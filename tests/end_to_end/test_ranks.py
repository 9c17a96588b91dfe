"""A learner of several ranks on Ray: whole runs, also with LoRA, and ranks that raise, die or hang."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from actors.pool.ray_actor import actor
from common.config.ppo import Config
from common.errors import RankLostError, UserError
from common.files import read_records
from deploy import session, train
from deploy.audit import run_audit
from learner.loop.journal import Journal
from learner.ppo.learner import Learner
from learner.ranks.group import LearnerGroup
from tests.fakes import save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import varied_batch
from tests.local_run import in_one_process
from tests.saving import mark

pytestmark = pytest.mark.ray

STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


# Whole runs


class Troubled(Learner):
    """The last rank raises, dies, freezes or hangs in some calls, each of them once: `markers` has a file for each
    trouble that was made."""

    troubles: Mapping[str, str] = {}  # by call and step
    markers = ""

    def join(self, rank: int, world: int, rendezvous: str) -> int:
        self._is_last = rank == world - 1
        return super().join(rank, world, rendezvous)

    def pid(self) -> int:
        return os.getpid()

    def get_into(self, troubles: Mapping[str, str]) -> None:
        self.troubles = troubles

    def update(self, table: Any) -> dict[str, float]:
        self._make_trouble(f"update {self.step}")
        return super().update(table)

    def ref_logprobs(self, *rollouts: Any) -> list[np.ndarray]:
        self._make_trouble(f"ref_logprobs {self.step}")
        return super().ref_logprobs(*rollouts)

    def _make_trouble(self, call: str) -> None:
        trouble, marker = self.troubles.get(call) if self._is_last else None, Path(self.markers, call)
        if trouble is None or marker.exists():
            return
        marker.touch()
        if trouble == "raises":
            raise ValueError("rank 1 cannot learn from this")
        if trouble in ("dies", "freezes"):
            os.kill(os.getpid(), signal.SIGKILL if trouble == "dies" else signal.SIGSTOP)
        if trouble == "hangs":
            time.sleep(600)


def troubled(markers: Path, troubles: Mapping[str, str]) -> type[Troubled]:
    return type("Learner", (Troubled,), {"troubles": troubles, "markers": str(markers)})


def run_config(model: Path, *, ranks: int, **overrides: Any) -> Config:
    settings = {
        "num_steps": STEPS,
        "rollouts_per_step": 16,
        "ppo": {"clip_eps": 0.2, "ppo_epochs": 2, "minibatches": 4},
        # With a small eps the scale of a gradient cancels in Adam's step, and a wrong one would not show.
        "optimizer": {"learning_rate": 4e-3, "value_head_learning_rate": 1e-2, "eps": 1e-3},
        "evaluation": {"prompts": 4},
        **overrides,
    }
    learner = {"precision": "fp32", "cpus": 0.5, "ranks": ranks, "timeout_s": 60, **settings.pop("learner", {})}
    return tiny_config(model, learner=learner, **settings)


def curve(directory: Path) -> list[dict[str, float]]:
    """Every step's metrics except times."""
    records = read_records(directory / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.endswith("_s") and k != "time"} for record in records]


@pytest.fixture(scope="module")
def alone(model, small_engines, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "alone"
    train.run_training(run_config(model, ranks=1), directory)
    return directory


def test_two_ranks_and_then_one_give_the_run_of_one(model, alone, tmp_path):
    """Metrics agree to a relative 1e-4 and an absolute 1e-5. Weights agree to 1e-6, but a few of them round to another
    bf16 value, which changes the next step's log-probabilities."""
    directory = tmp_path / "run"
    train.run_training(run_config(model, ranks=2, num_steps=STEPS - 1), directory)
    assert len(list((directory / f"checkpoints/step-{STEPS - 1:06d}").glob("weights-*.safetensors"))) == 2
    train.run_training(run_config(model, ranks=1), directory, resume=True)
    assert len(curve(alone)) == STEPS
    journals = [Journal(path / "journal") for path in (alone, directory)]
    for step in range(STEPS):
        responses = [journal.read(step).table["response_ids"].to_pylist() for journal in journals]
        assert responses[0] == responses[1]
    for found, expected in zip(curve(directory), curve(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    losses = [record["value/loss"] for record in curve(alone)]
    assert len(set(losses)) == STEPS


def test_a_run_whose_learner_dies_and_freezes_ends_with_the_same_bits(model, alone, tmp_path, monkeypatch):
    """Nobody continues it by hand, and its generator lives on."""
    directory, markers = tmp_path / "run", tmp_path / "markers"
    markers.mkdir()
    monkeypatch.setattr(train, "Learner", troubled(markers, {"update 1": "dies", "update 2": "freezes"}))
    train.run_training(run_config(model, ranks=1, learner={"probe_timeout_s": 5}), directory)
    assert sorted(os.listdir(markers)) == ["update 1", "update 2"]
    weights = [(path / "policy" / "model.safetensors").read_bytes() for path in (alone, directory)]
    assert weights[0] == weights[1]
    assert curve(directory) == curve(alone)
    tables = [
        [pq.read_table(path / f"credit/step-{step:06d}.parquet") for step in range(STEPS)]
        for path in (alone, directory)
    ]
    assert tables[0] == tables[1]
    events = [event["event"] for event in read_records(directory / "pool-events.jsonl")]
    assert events == ["joined"] * 3


def test_a_lora_run_on_two_ranks_saves_adapter_and_merged_policy(model, small_engines, tmp_path, monkeypatch):
    """Also if a rank dies while the loop waits for rollouts, and they for their reference log-probabilities."""
    started: list[str] = []
    monkeypatch.setattr(train, "Learner", troubled(tmp_path, {"ref_logprobs 1": "dies"}))

    class Starter(train.Starter):
        async def references(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("with LoRA the learner itself is the reference")

    def note(role: type, *about: Any, **more: Any) -> Any:
        started.append(role.__name__)
        return actor(role, *about, **more)

    monkeypatch.setattr(train, "Starter", Starter)
    monkeypatch.setattr("actors.pool.ray_host.actor", note)
    directory = tmp_path / "run"
    lora = {"lora": {"rank": 4, "alpha": 8}}
    train.run_training(run_config(model, ranks=2, num_steps=2, learner=lora), directory)
    assert sorted(started) == ["Generator", "Reward"]
    assert (tmp_path / "ref_logprobs 1").exists()
    first, second = curve(directory)
    assert first["kl/per_token"] == 0.0  # the policy is the reference
    assert abs(second["kl/per_token"]) > 1e-6
    assert abs(second["mismatch/kl"]) < 1e-3  # generators sample from base plus adapters
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["before"]["kl_per_response"] == 0.0
    assert summary["after"]["kl_per_response"] != 0.0

    row = Journal(directory / "journal").read(1).table.to_pylist()[0]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    np.testing.assert_allclose(row["ref_logprobs"], logprobs_of(base, row), atol=1e-4)

    merged = AutoModelForCausalLM.from_pretrained(directory / "policy", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, directory / "adapter").eval()
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=0.02)  # the merged one is rounded to bf16
    assert run_audit(directory, replay=True) == 0  # by two processes, without Ray


def logprobs_of(model: Any, row: dict[str, Any]) -> np.ndarray:
    prompt, response = row["prompt_ids"], row["response_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response].numpy()


def test_with_lora_the_reference_is_always_the_policy_without_adapters(model, tmp_path):
    directory = tmp_path / "run"
    learner = {"lora": {"rank": 4, "alpha": 8}}
    cfg = run_config(model, ranks=1, max_staleness=1, learner=learner, evaluation={"prompts": 0})
    with in_one_process():
        train.run_training(cfg, directory)
    assert [record["staleness/max"] for record in curve(directory)] == [0, 1, 1]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for step in Journal(directory / "journal").since(0):
        for row in step.table.to_pylist():
            np.testing.assert_allclose(row["ref_logprobs"], logprobs_of(base, row), atol=1e-4)


# Ranks that fail

LIMIT_S = 300  # of all updates: a group that waits for its own, longer limit fails the tests
TROUBLES = ("dies", "freezes", "hangs", "raises")  # the last one ends the group


@dataclass
class Outcome:
    """How an update ended in which the last rank failed."""

    error: BaseException
    rank_id: str  # of the last rank, as Ray names actors
    policy: bytes  # the file of weights after the group started again, restored the first update and repeated this one


async def repeated(learner: LearnerGroup, directory: Path, name: str) -> bytes:
    """The file of weights after the second update, which follows on the checkpoint in `directory`."""
    await learner.restore(directory / "checkpoint")
    assert learner.step == 1
    await learner.update(varied_batch(1))
    await learner.save_policy(directory / name)
    return (directory / name / "model.safetensors").read_bytes()


async def fail(learner: LearnerGroup, trouble: str, directory: Path) -> Outcome:
    """Two ranks fail in the second update. Checks that no process of theirs is left."""
    handles, rendezvous = learner._processes.handles, Path(learner._rendezvous.removeprefix("file://")).parent
    pids = await asyncio.gather(*(handle.pid.remote() for handle in handles))
    rank_id = handles[-1]._actor_id.hex()
    await learner.restore(directory / "checkpoint")
    await handles[-1].get_into.remote({"update 1": trouble})
    with pytest.raises((RankLostError, ValueError)) as failed:
        await learner.update(varied_batch(1))
    assert learner.step == 1
    if trouble == "raises":
        learner.stop()
    else:
        await learner.rebuild()
    await until_gone(pids)
    assert not rendezvous.exists()
    return Outcome(failed.value, rank_id, b"" if trouble == "raises" else await repeated(learner, directory, trouble))


async def until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank's process is left"
        await asyncio.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:  # there is no such process, perhaps since a moment ago
        return False


@pytest.fixture(scope="module")
def group(model, ray_cluster, tmp_path_factory):
    """The weights after two updates of two ranks that nothing disturbed, and the outcome of each trouble. One group has
    all of them, because starting a rank takes longest."""
    directory = tmp_path_factory.mktemp("group")
    settings = {"cpus": 0, "timeout_s": 2 * LIMIT_S, "probe_timeout_s": 5}
    cfg = run_config(model, ranks=2, rollouts_per_step=8, learner=settings)
    role = troubled(directory, {})

    async def scenario() -> tuple[bytes, dict[str, Outcome]]:
        learner = LearnerGroup(lambda rank: actor(role, cfg.learner).remote(cfg), cfg.learner, startup_timeout_s=120)
        outcomes = {}
        try:
            await learner.start()
            stats = await learner.update(varied_batch(0))
            assert stats["ppo/optimizer_steps"] == 8
            mark(directory / "checkpoint", await learner.save(directory / "checkpoint"))
            undisturbed = await repeated(learner, directory, "undisturbed")
            for trouble in TROUBLES:
                learner._timeout_s = 10 if trouble == "hangs" else cfg.learner.timeout_s
                (directory / "update 1").unlink(missing_ok=True)  # the marker of the trouble before
                outcomes[trouble] = await fail(learner, trouble, directory)
        finally:
            learner.stop()
        return undisturbed, outcomes

    return asyncio.run(asyncio.wait_for(scenario(), LIMIT_S))


def test_a_rank_that_raises_fails_the_step_with_its_own_error(group):
    """The group waits at most 10 s for the other ranks' errors."""
    error = group[1]["raises"].error
    assert isinstance(error, ValueError)
    text = str(error)
    assert "rank 1 cannot learn from this" in text
    assert 'raise ValueError("rank 1 cannot learn from this")' in text  # the traceback of its own process
    assert error.__notes__ == ["rank 1 of 2 did not update at step 1"]


def test_a_group_whose_rank_is_killed_learns_the_same_weights(group):
    """Rank 0 fails too, because its connection breaks; its error is not the cause."""
    undisturbed, outcome = group[0], group[1]["dies"]
    assert isinstance(outcome.error, RankLostError)
    assert str(outcome.error).startswith('Learner(1) died during "update at step 1": its process')
    assert outcome.rank_id in str(outcome.error.__cause__)
    assert outcome.policy == undisturbed


def test_a_group_whose_rank_freezes_learns_the_same_weights(group):
    """The other rank waits for it in the middle of the update."""
    undisturbed, outcome = group[0], group[1]["freezes"]
    assert isinstance(outcome.error, RankLostError)
    assert str(outcome.error).startswith("Learner(1) answered no health probe for 5 s (learner.probe_timeout_s)")
    assert outcome.policy == undisturbed


def test_a_rank_that_hangs_is_named_when_the_time_is_up(group):
    undisturbed, outcome = group[0], group[1]["hangs"]
    assert isinstance(outcome.error, RankLostError)
    assert "Learner(1) did not update at step 1 within 10 s (learner.timeout_s)" in str(outcome.error)
    assert outcome.policy == undisturbed


def test_a_run_that_cannot_be_placed_is_refused_and_leaves_nothing(model, ray_cluster, tmp_path, monkeypatch):
    """On the nodes of the cluster that runs."""
    monkeypatch.setattr(session, "cluster", lambda *_: nullcontext(ray_cluster))
    with pytest.raises(UserError, match=r"no node has room for Generator.*CPUs"):
        train.run_training(run_config(model, ranks=2, generators={"cpus": 1000}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Guest:
    """Takes the room of a rank."""


def test_a_group_continues_with_fewer_ranks_when_there_is_no_room(model, group, tmp_path):
    settings = {"cpus": 1, "timeout_s": LIMIT_S, "min_ranks": 1, "room_wait_s": 2}
    cfg = run_config(model, ranks=2, rollouts_per_step=8, learner=settings)
    told: list[str] = []

    async def scenario() -> bytes:
        learner = LearnerGroup(
            lambda rank: actor(Troubled, cfg.learner).remote(cfg),
            cfg.learner,
            startup_timeout_s=120,
            report=told.append,
        )
        others = [ray.remote(num_cpus=ray.cluster_resources()["CPU"] - 2)(Guest).remote()]
        try:
            await learner.start()
            assert not [text for text in told if " waits for a node" not in text]
            await learner.update(varied_batch(0))
            mark(tmp_path / "checkpoint", await learner.save(tmp_path / "checkpoint"))
            os.kill(await learner._processes.handles[1].pid.remote(), signal.SIGKILL)
            others.append(ray.remote(num_cpus=1)(Guest).remote())
            await others[-1].__ray_ready__.remote()
            await learner.rebuild()
            [told_of_room] = [text for text in told if " waits for a node" not in text]
            assert "has room for 1 of 2" in told_of_room
            assert len(learner._processes.handles) == 1
            await learner.restore(tmp_path / "checkpoint")
            await learner.update(varied_batch(1))
            await learner.save_policy(tmp_path / "policy")
        finally:
            learner.stop()
            for other in others:
                ray.kill(other)
        return (tmp_path / "policy" / "model.safetensors").read_bytes()

    found = safetensors.torch.load(asyncio.run(asyncio.wait_for(scenario(), LIMIT_S)))
    expected = safetensors.torch.load(group[0])
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-4)  # bf16
