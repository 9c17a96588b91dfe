"""Digests of everything that a run depends on: what changes one, and which differences are refused."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.scoring.kinds import kind_of
from common.config.sources import FunctionSourceConfig, HttpSourceConfig
from common.errors import UserError
from common.model.identity import file_digest, model_digest
from common.types import PromptRecord
from common.user_code.import_path import module_file
from deploy.policy_files import PolicyFiles
from deploy.run.identity import accepted_differences, identity_of, prompts_digest
from tests.fakes import save_tiny_model, tiny_config


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "model")


RECORD = PromptRecord("ask a1", np.array([3, 5], dtype=np.int32), {"answer": 1, "level": "b"})
OTHER = PromptRecord("ask a2", np.array([3, 6], dtype=np.int32), {})


def test_a_models_digest_is_that_of_its_files_in_order(model):
    def sha(text):
        return hashlib.sha256(text if isinstance(text, bytes) else text.encode()).hexdigest()

    for path in model.iterdir():
        if path.name != "config.json":
            path.unlink()
    (model / "a.safetensors").write_bytes(b"weights")
    config = {k: v for k, v in json.loads((model / "config.json").read_text()).items() if k != "transformers_version"}
    lines = [f"a.safetensors\0{sha(b'weights')}\n", f"config.json\0{sha(json.dumps(config, sort_keys=True))}\n"]
    assert model_digest(model) == sha("".join(lines))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_weights_tokenizer_and_config_belong_to_a_model(model, name):
    before = model_digest(model)
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[:-20] + content[-20:].replace(b"}", b', "new": 1}') + b" ")
    assert model_digest(model) != before


def test_a_readme_and_the_writers_version_do_not(model):
    before = model_digest(model)
    (model / "README.md").write_text("a model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9.9"}))
    assert model_digest(model) == before


def test_a_large_file_is_read_once(model, monkeypatch):
    names, digest = [], hashlib.file_digest

    def noted(file, kind):
        names.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    assert model_digest(model) == model_digest(model)
    assert names.count("model.safetensors") == 1
    (model / "model.safetensors").write_bytes(b"others")
    file_digest(model / "model.safetensors")
    assert names.count("model.safetensors") == 2


@pytest.mark.parametrize(
    ("records", "numbers"),
    [
        ([replace(RECORD, text="ask a2"), OTHER], (0, 1)),
        ([replace(RECORD, fields={"answer": 2, "level": "b"}), OTHER], (0, 1)),
        ([replace(RECORD, token_ids=np.array([3, 6], dtype=np.int32)), OTHER], (0, 1)),
        ([replace(RECORD, messages=[{"role": "user", "content": "ask a1"}]), OTHER], (0, 1)),
        ([OTHER, RECORD], (0, 1)),
        ([RECORD], (0, 1)),
        ([RECORD, OTHER, OTHER], (0, 1)),
        ([RECORD, OTHER], (1, 1)),
        ([RECORD, OTHER], (0, 2)),
    ],
)
def test_every_part_of_the_prompts_and_their_order_count(records, numbers):
    assert prompts_digest(records, *numbers) != prompts_digest([RECORD, OTHER], 0, 1)


def test_the_order_of_a_records_fields_does_not_count():
    swapped = replace(RECORD, fields={"level": "b", "answer": 1})
    assert prompts_digest([swapped]) == prompts_digest([RECORD])


def test_a_field_that_prints_its_address_has_the_same_digest_again():
    class Field:
        pass

    assert prompts_digest([replace(RECORD, fields={"x": Field()})]) == prompts_digest(
        [replace(RECORD, fields={"x": Field()})]
    )


def test_a_reward_functions_digest_is_that_of_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/__init__.py").write_text("raise ImportError('it must not be imported')")
    (tmp_path / "pack/rewards.py").write_text("def score(answer): return 1.0")
    source = FunctionSourceConfig(name="f", function="pack.rewards:score")
    digest = kind_of(source).identity(source)
    assert digest == hashlib.sha256(b"def score(answer): return 1.0").hexdigest()
    (tmp_path / "pack/rewards.py").write_text("def score(answer): return 2.0")
    assert kind_of(source).identity(source) != digest
    assert "pack" not in sys.modules
    assert module_file("no_such_module.at_all") is None
    assert module_file("sys") is None  # built in


def test_a_module_is_found_below_folders_without_an_init_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "outer/inner").mkdir(parents=True)
    (tmp_path / "outer/inner/rewards.py").touch()
    assert module_file("outer.inner.rewards") == tmp_path / "outer/inner/rewards.py"
    assert module_file("outer.inner") is None
    assert module_file("outer.inner.nothing") is None
    assert "outer" not in sys.modules


def test_the_parts_of_a_run_have_the_names_of_their_settings(model):
    cfg = tiny_config(model)
    service = HttpSourceConfig(name="h", urls=["http://h"])
    sources = (service, FunctionSourceConfig(name="f", function="tests.tasks:a_words"))
    cfg = cfg.model_copy(update={"reward": cfg.reward.model_copy(update={"sources": sources})})
    policy = PolicyFiles.load(str(model))
    found = identity_of(cfg, policy, [RECORD], [OTHER])
    assert found == {
        "model": model_digest(model),
        "prompts.train": prompts_digest([RECORD], cfg.seed, cfg.prompts.rollouts_per_prompt),
        "prompts.heldout": prompts_digest([OTHER]),
        "reward.sources.1": file_digest(module_file("tests.tasks")),  # nothing is known of the service
    }
    assert identity_of(cfg, policy, [RECORD], []).keys() == found.keys() - {"prompts.heldout"}


SHOWN = {"model": "m", "prompts.train": "t", "prompts.heldout": "h"}


def test_a_difference_is_refused_by_name_with_the_way_to_accept_it():
    now, before = {"model": "a" * 64, "prompts.train": "b" * 64}, {"model": "c" * 64, "prompts.train": "b" * 64}
    with pytest.raises(UserError) as refused:
        accepted_differences(now, before, [], SHOWN, {})
    assert str(refused.value) == (
        "the run began with other contents: model (m) has SHA-256 aaaaaaaaaaaa, in the journal cccccccccccc. Restore "
        "them, or continue with what is there now: add --accept model, which the journal records; or start a new run"
    )
    assert accepted_differences(now, before, ["model"], SHOWN, {}) == {"model": "a" * 64}
    assert accepted_differences(now, now, ["model"], SHOWN, {}) == {}  # accepted before


def test_accepting_one_part_does_not_accept_another():
    now, before = {"model": "1", "prompts.train": "2"}, {"model": "3", "prompts.train": "4"}
    with pytest.raises(UserError, match=r"contents: prompts.train \(t\) has"):
        accepted_differences(now, before, ["model"], SHOWN, {})


def test_a_part_that_the_run_did_not_have_is_recorded():
    assert accepted_differences({"model": "1", "prompts.heldout": "2"}, {"model": "1"}, [], SHOWN, {}) == {
        "prompts.heldout": "2"
    }
    assert accepted_differences({"model": "1"}, {"model": "1", "prompts.heldout": "2"}, [], SHOWN, {}) == {}


def test_a_name_that_the_run_does_not_depend_on_is_refused():
    with pytest.raises(UserError, match=r"--accept modle: the run depends on model, prompts.train; name one of them"):
        accepted_differences({"model": "1", "prompts.train": "2"}, {}, ["modle"], SHOWN, {})
