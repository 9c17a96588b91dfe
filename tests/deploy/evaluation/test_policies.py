"""Which policies are asked what, what an evaluation that continues may change, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import UserError
from common.types import PromptRecord
from deploy.evaluation.policies import EvaluationPlan, check_identity, check_room, identity_of, load_policies
from deploy.policy_files import PolicyFiles
from tests.fakes import save_tiny_model, tiny_config

CFG = tiny_config("m")


@pytest.mark.parametrize(
    ("policies", "samples", "asked"),
    [
        ({}, 1, {"base": "m"}),
        ({"mine": "p"}, 1, {"mine": "p"}),  # the only case without the base
        ({}, 8, {"base": "m"}),
        ({"mine": "p"}, 8, {"base": "m", "mine": "p"}),
        ({"mine": "p", "other": "q"}, 1, {"base": "m", "mine": "p", "other": "q"}),
    ],
)
def test_the_base_comes_first_where_there_is_something_to_compare(policies, samples, asked):
    found = EvaluationPlan.of(CFG, policies, samples)
    assert list(found.paths.items()) == list(asked.items())
    assert found.is_single == (len(asked) == samples == 1)
    assert found.base == ("base" if "base" in asked else None)


def test_a_policy_that_is_the_base_is_refused_next_to_it():
    with pytest.raises(UserError, match=r"is model\.path, which is evaluated as the base; leave it out"):
        EvaluationPlan.of(CFG, {"same": "m"}, 2)


def test_model_path_evaluated_alone_may_get_more_samples():
    alone = EvaluationPlan.of(CFG, {"same": "m"}, 1)
    assert alone.is_single
    assert alone.paths == {"base": "m"}
    assert alone.extended(CFG, {}, 4) == EvaluationPlan({"base": "m"}, 4)


def test_what_is_asked_is_read_as_it_was_written(tmp_path):
    plan = EvaluationPlan.of(CFG, {"mine": "p"}, 4)
    plan.write(tmp_path, {"prompts.heldout": "abc"})
    assert EvaluationPlan.read(tmp_path) == plan
    (tmp_path / "evaluated.json").write_text("{}")
    with pytest.raises(UserError, match=r"evaluated\.json cannot be read .*; restore it, or begin again with --force"):
        EvaluationPlan.read(tmp_path)


def test_an_evaluation_that_continues_may_ask_more():
    plan = EvaluationPlan.of(CFG, {"mine": "p"}, 4)
    assert plan.extended(CFG, {}, None) == plan
    assert plan.extended(CFG, {"mine": "p"}, 4) == plan
    assert plan.extended(CFG, {"new": "q"}, 8) == EvaluationPlan({"base": "m", "mine": "p", "new": "q"}, 8)
    assert EvaluationPlan.of(CFG, {"mine": "p"}, 1).extended(CFG, {}, 3) == EvaluationPlan(
        {"base": "m", "mine": "p"}, 3
    )
    assert EvaluationPlan.of(CFG, {}, 1).extended(CFG, {}, 3) == EvaluationPlan({"base": "m"}, 3)
    with pytest.raises(UserError, match=r"--samples \(2\) is below the 4 of this evaluation; it can only rise"):
        plan.extended(CFG, {}, 2)
    with pytest.raises(UserError, match="q: mine is p in this evaluation; choose a name: NAME=q"):
        plan.extended(CFG, {"mine": "q"}, None)
    with pytest.raises(UserError, match="--policy p: it is mine in this evaluation; leave it out"):
        plan.extended(CFG, {"again": "p"}, None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [save_tiny_model(tmp_path_factory.mktemp(name)) for name in ("model", "same")]


def record(*tokens):
    return PromptRecord("text", np.array(tokens, np.int32), {})


def test_other_contents_than_at_the_beginning_are_refused_by_name(models, tmp_path):
    cfg = tiny_config(models[0])
    reference, policies = load_policies(cfg, EvaluationPlan.of(cfg, {"mine": str(models[1])}, 2))
    before = identity_of(cfg, reference, policies, [record(3)])
    EvaluationPlan.of(cfg, {}, 2).write(tmp_path, before)
    check_identity(tmp_path, before)
    check_identity(tmp_path, {**before, "policy new": "x"})  # --policy
    changes = {
        "evaluation.judges.0": {"evaluation": {"judges": [{"name": "gold", "function": "tests.tasks:a_words"}]}},
        "sampling": {"sampling": {**cfg.sampling.model_dump(), "top_k": 1}},
        "seed": {"seed": cfg.seed + 1},
        "generators.dtype": {"generators": {**cfg.generators.model_dump(), "dtype": "bfloat16"}},
        "reference.dtype": {"reference": {**cfg.reference.model_dump(), "dtype": "bfloat16"}},
    }
    others = {
        name: identity_of(tiny_config(models[0], **change), reference, policies, [record(3)])
        for name, change in changes.items()
    }
    others |= {
        "prompts.heldout": identity_of(cfg, reference, policies, [record(4)]),
        "policy mine": {**before, "policy mine": "other weights"},
        "model.path": {**before, "model.path": "other weights"},
    }
    for name, now in others.items():
        with pytest.raises(UserError, match=f"began with other contents of {name}; restore them, or begin again"):
            check_identity(tmp_path, now)


def test_another_environment_than_at_the_beginning_is_refused(models, tmp_path):
    def identity(**settings):
        cfg = tiny_config(models[0], environment={"function": "tests.actors.environments.games:Counting", **settings})
        reference, policies = load_policies(cfg, EvaluationPlan.of(cfg, {}, 2))
        return cfg, identity_of(cfg, reference, policies, [record(3)])

    cfg, before = identity()
    assert set(cfg.environment.fixed) == {
        *("function", "tools", "agent", "verifiers", "tool_parser", "max_turns", "max_tokens", "sequence")
    }
    EvaluationPlan.of(cfg, {}, 2).write(tmp_path, before)
    _, same = identity(concurrent=3, min=2, timeout_s=500, step_timeout_s=5)
    check_identity(tmp_path, same)
    plain = tiny_config(models[0])
    reference, policies = load_policies(plain, EvaluationPlan.of(plain, {}, 2))
    others = [
        identity(max_turns=3)[1],
        identity(function="tests.tasks:NoSuchClass")[1],
        identity_of(plain, reference, policies, [record(3)]),
    ]
    for other in others:
        with pytest.raises(UserError, match="began with other contents of environment; restore them"):
            check_identity(tmp_path, other)


def test_a_policy_with_another_tokenizer_is_refused(models, tmp_path, monkeypatch):
    cfg = tiny_config(models[0])
    load = PolicyFiles.load

    def with_another_vocabulary(path, *arguments, **options):
        found = load(path, *arguments, **options)
        other = SimpleNamespace(get_vocab=lambda: {"a": 0})
        return replace(found, tokenizer=other) if path == str(models[1]) else found

    monkeypatch.setattr(PolicyFiles, "load", with_another_vocabulary)
    with pytest.raises(UserError, match="have different tokenizers, so there is no KL between them"):
        load_policies(cfg, EvaluationPlan.of(cfg, {"mine": str(models[1])}, 2))


def test_a_policy_without_room_for_the_longest_prompt_is_refused(models):
    policy = PolicyFiles.load(str(models[0]))  # a context of 128 tokens
    records = [record(3), record(*[3] * 120)]
    check_room({"mine": policy}, records, 8)
    with pytest.raises(UserError, match=r"context of 128 tokens, and the longest prompt with its response needs 129"):
        check_room({"mine": policy}, records, 9)
