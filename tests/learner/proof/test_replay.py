"""A replay from the journal alone gives the weights of the run, bit for bit; a difference is found and named."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import RoleError, UserError
from common.files import read_records
from learner.loop.journal import Journal
from learner.proof.audit import audit
from learner.proof.chain import Violation
from learner.proof.ranks import in_ranks
from learner.proof.replay import Replay
from learner.proof.tensors import whole_tensors
from tests.durability.disasters import contents
from tests.durability.small_run import (
    EPISODES,
    FROM_A_CRITIC,
    NUM_STEPS,
    save_smallest_model,
    small_config,
    train_to_the_end,
)
from tests.learner.proof.failing_rank import Fails
from tests.learner.proof.forge import forge_checkpoint, forge_credit, replace_column

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KINDS: dict[str, dict[str, Any]] = {
    "shared-critic": {},
    "separate-critic": {"learner": {"critic": "separate"}},
    "trained-critic": FROM_A_CRITIC,
    "lora": {"learner": {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}},
    "asynchronous": {"max_staleness": 1},
    "poison": {"roles": {"poison": (0, 5)}},
    "poison-first": {"roles": {"poison": (0, 3)}, "checkpoint": {"every": 1, "keep": 2}},
    "warm-up": {
        "learner": {"critic_warmup_steps": 4},
        "ppo": {"ppo_epochs": 1, "minibatches": 2, "value_epochs": 2},
    },
    "episodes": EPISODES,
    "bf16": {"learner": {"precision": "bf16"}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_smallest_model(tmp_path_factory.mktemp("model"))


def trained(directory: Path, model: Path, about: dict[str, Any]) -> Path:
    train_to_the_end(directory, model, **about)
    return directory


def settings(model: Path, about: dict[str, Any]) -> Any:
    return small_config(model, **{key: value for key, value in about.items() if key != "roles"})


@pytest.fixture(scope="module", params=KINDS)
def run(request, model, tmp_path_factory):
    about = KINDS[request.param]
    return trained(tmp_path_factory.mktemp("run") / "run", model, about), settings(model, about)


def policy(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_the_journal_alone_gives_the_weights_of_the_run(run, tmp_path):
    directory, cfg = run
    copy = Path(shutil.copytree(directory, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints", "policy")))
    Replay(cfg, copy, NUM_STEPS, tmp_path, to=tmp_path / "policy")()
    assert policy(tmp_path / "policy") == policy(directory / "policy")
    base = load_file(Path(cfg.model.path) / "model.safetensors")
    found = load_file(tmp_path / "policy/model.safetensors")
    assert any(not torch.equal(found[name], base[name].bfloat16()) for name in base)


def test_a_replay_from_a_checkpoint_gives_the_same(run, tmp_path):
    directory, cfg = run
    Replay(cfg, directory, NUM_STEPS, tmp_path, start=directory / "checkpoints/step-000004", to=tmp_path / "policy")()
    assert policy(tmp_path / "policy") == policy(directory / "policy")


def test_the_journal_alone_gives_the_values_of_every_token(run, tmp_path):
    directory, cfg = run
    written = contents(directory / "credit")
    voided = Journal(directory / "journal").voided
    assert list(written) == [f"step-{step:06d}.parquet" for step in range(NUM_STEPS) if step not in voided]
    replay = partial(Replay, cfg, directory, NUM_STEPS, tmp_path)
    replay(credit=range(NUM_STEPS), credit_to=tmp_path / "all")()
    assert contents(tmp_path / "all") == written
    replay(start=directory / "checkpoints/step-000004", credit=range(4, 5), credit_to=tmp_path / "last")()
    assert contents(tmp_path / "last") == {name: written[name] for name in ("step-000004.parquet",)}


def test_every_checkpoint_metric_and_weight_is_compared(run, tmp_path):
    directory, cfg = run
    found = audit(directory)
    assert list(found.checkpoints.complete) == [4, 5]
    compare = partial(
        Replay, cfg, directory, NUM_STEPS, checkpoints=found.checkpoints.complete, policy=directory / "policy"
    )
    compare(scratch=tmp_path / "honest", metrics=found.metrics)()
    found.metrics.records[2]["learner/tokens"] += 1
    with pytest.raises(Violation, match=r"^replay: step 2: learner/tokens was "):
        compare(scratch=tmp_path / "other", metrics=found.metrics)()


@pytest.mark.parametrize("controller", ["fixed", "adaptive"])
def test_a_change_before_a_void_step_holds_after_a_checkpoint(model, tmp_path, controller):
    """kl.coef changes from 0.1 to 0.5 before step 3, whose batch is void. The run is interrupted after it."""
    settings: dict[str, Any] = {"checkpoint": {"every": 1, "keep": 9}, "kl": {"controller": controller, "coef": 0.1}}
    begun = trained(tmp_path / "begun", model, {**settings, "num_steps": 3})
    probe = trained(Path(shutil.copytree(begun, tmp_path / "probe")), model, {**settings, "num_steps": 4})
    row = Journal(probe / "journal").read(3).table.slice(0, 1).to_pylist()[0]
    settings["kl"] = {"controller": controller, "coef": 0.5}
    roles = {"poison": (row["epoch"], row["prompt_index"])}
    journal = Journal(begun / "journal")
    journal.open_for_writing()
    journal.note("change", settings={"kl.coef": 0.5})
    whole, parts = (Path(shutil.copytree(begun, tmp_path / name)) for name in ("whole", "parts"))
    trained(whole, model, {**settings, "roles": roles, "num_steps": 6})
    for num_steps in (4, 6):
        trained(parts, model, {**settings, "roles": roles, "num_steps": num_steps})
    for run in (whole, parts):
        assert list(Journal(run / "journal").voided) == [3]
        used = {record["step"]: record.get("kl/coef") for record in read_records(run / "metrics.jsonl")}
        assert (used[0], used[3], used[4]) == (0.1, None, 0.5)
        if controller == "fixed":
            assert [used[step] for step in (1, 2, 5)] == [0.1, 0.1, 0.5]
    assert policy(whole / "policy") == policy(parts / "policy")
    cfg, complete = small_config(model, **settings, num_steps=6), audit(parts).checkpoints.complete
    for start in (None, parts / "checkpoints/step-000004"):
        scratch = tmp_path / f"scratch-{start is None}"
        Replay(cfg, parts, 6, scratch, start=start, checkpoints=complete, policy=parts / "policy")()


def one_more(data: bytes) -> bytes:
    """The last bit of the last weight."""
    return data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]


@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_a_checkpoint_that_the_journal_does_not_lead_to_is_found(run, kind, tmp_path):
    """Its hashes are right: only learning the journal again can tell."""
    directory, cfg = run
    forged = Path(shutil.copytree(directory, tmp_path / "run"))
    forge_checkpoint(forged, 4, f"{kind}-00000.safetensors", one_more)
    found = audit(forged)
    with pytest.raises(Violation, match=r"^replay: .*step-000004: .* is not what the journal leads to"):
        Replay(cfg, forged, NUM_STEPS, tmp_path / "scratch", checkpoints=found.checkpoints.complete)()


def test_other_numbers_than_those_of_the_journal_are_found(run, tmp_path):
    directory, cfg = run
    forged = Path(shutil.copytree(directory, tmp_path / "run"))
    forge_checkpoint(forged, 5, "numbers.json", lambda data: data.replace(b'"kl_coef": 0', b'"kl_coef": 1'))
    with pytest.raises(Violation, match=r"^replay: .*step-000005 has the numbers"):
        Replay(cfg, forged, NUM_STEPS, tmp_path / "s", checkpoints=audit(forged).checkpoints.complete)()


def test_credit_that_the_journal_does_not_lead_to_is_found(run, tmp_path):
    directory, cfg = run
    forged = Path(shutil.copytree(directory, tmp_path / "run"))
    [*_, last] = sorted(path.name for path in (forged / "credit").iterdir())
    Replay(cfg, forged, NUM_STEPS, tmp_path / "honest", credit=range(NUM_STEPS))()
    step = int(last.removesuffix(".parquet")[5:])
    forge_credit(forged, step, lambda table, about: replace_column(table, "returns", table["kl"].to_pylist()))
    audit(forged)
    with pytest.raises(Violation, match=f"^replay: .*{last}: returns is not what the journal leads to"):
        Replay(cfg, forged, NUM_STEPS, tmp_path / "forged", credit=range(NUM_STEPS))()


def test_a_policy_that_the_journal_does_not_lead_to_is_found(run, tmp_path):
    directory, cfg = run
    forged = Path(shutil.copytree(directory / "policy", tmp_path / "policy"))
    tensors = load_file(forged / "model.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, forged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Violation, match=f"^replay: .*policy: {name} is not what"):
        Replay(cfg, directory, NUM_STEPS, tmp_path / "scratch", policy=forged)()


# Several ranks


def test_two_ranks_replay_what_two_ranks_learned(model, tmp_path):
    """And one rank replays the same up to rounding: the layout of devices decides the last bits."""
    directory = trained(tmp_path / "run", model, {"checkpoint": {"every": 9, "keep": 1}})
    cfg = small_config(model)
    two = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"ranks": 2, "timeout_s": 60})})
    for name in ("first", "second"):
        scratch = tmp_path / name
        scratch.mkdir()
        outputs = {"to": scratch / "policy", "credit": range(NUM_STEPS), "credit_to": scratch / "credit"}
        in_ranks(Replay(two, directory, NUM_STEPS, scratch, **outputs), 2, gpus=0, scratch=scratch)
    assert policy(tmp_path / "first/policy") == policy(tmp_path / "second/policy")
    assert contents(tmp_path / "first/credit") == contents(tmp_path / "second/credit")
    assert contents(tmp_path / "first/credit").keys() == contents(directory / "credit").keys()
    found, one = (load_file(path / "policy/model.safetensors") for path in (tmp_path / "first", directory))
    for name, tensor in one.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (Violation("replay", "a weight differs"), Violation, r"^replay: a weight differs$"),
        (UserError("no such model"), UserError, "no such model"),
        (ZeroDivisionError("oh"), RoleError, r"rank 1 failed:\n(.|\n)*ZeroDivisionError: oh"),
        (None, RoleError, "rank 1 ended without an error message"),
    ],
    ids=["violation", "user", "fault", "death"],
)
def test_the_error_of_a_rank_ends_all_of_them(error, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        in_ranks(Fails(error), 2, gpus=0, scratch=tmp_path)


def test_every_rank_on_gpus_needs_a_name_in_cuda_visible_devices(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    with pytest.raises(UserError, match=r"has a rank 1, but CUDA_VISIBLE_DEVICES \(GPU-a\) names only 1 GPU"):
        in_ranks(Fails(None), 2, gpus=1, scratch=tmp_path)


def test_tensors_that_two_ranks_wrote_are_put_together(tmp_path):
    import json

    whole = torch.arange(12.0).reshape(4, 3)
    for rank, rows in enumerate((slice(0, 3), slice(3, 4))):
        places = {"w": {"shape": [4, 3], "offset": [rows.start, 0]}}
        tensors = {"w": whole[rows].clone()}
        save_file(tensors, tmp_path / f"weights-{rank:05d}.safetensors", metadata={"ratchet": json.dumps(places)})
    assert torch.equal(whole_tensors(tmp_path.glob("*.safetensors"))["w"], whole)
